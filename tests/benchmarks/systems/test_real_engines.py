"""What is read of a service's metrics, and of its hold queue?"""

import pytest

from benchmarks.systems.real_engines import HoldQueueMonitor, metric_total

METRICS = """\
# HELP headway_prompt_tokens_total Prompt tokens served
# TYPE headway_prompt_tokens_total counter
headway_prompt_tokens_total{model="a"} 100.0
headway_prompt_tokens_total{model="b"} 20.0
# HELP headway_resume_delay_seconds From an engine's failure to the next byte
# TYPE headway_resume_delay_seconds histogram
headway_resume_delay_seconds_bucket{le="1.0",model="a"} 2.0
headway_resume_delay_seconds_bucket{le="+Inf",model="a"} 3.0
headway_resume_delay_seconds_count{model="a"} 3.0
headway_resume_delay_seconds_sum{model="a"} 4.5
"""


def test_a_metric_is_summed_over_its_labels():
    assert metric_total(METRICS, "headway_prompt_tokens_total") == 120.0
    assert metric_total(METRICS, "headway_resume_delay_seconds_count") == 3.0
    assert metric_total(METRICS, "headway_resume_delay_seconds_sum") == 4.5
    assert metric_total(METRICS, "headway_prompt_tokens") == 0.0


def test_mean_hold_is_mean_length_over_arrival_rate():
    queue = HoldQueueMonitor(service=None, num_held=[0, 4, 2])
    assert queue.mean_hold_s(span_s=10.0, num_requests=20) == pytest.approx(1.0)
    assert HoldQueueMonitor(service=None).mean_hold_s(10.0, 20) == 0.0
