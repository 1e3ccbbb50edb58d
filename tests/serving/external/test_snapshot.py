"""What is made of a look at the metrics and of what we have sent."""

from dataclasses import dataclass

from router import EngineInfo
from serving.engine.external.metrics import Metrics
from serving.engine.external.snapshot import (
    Poll,
    StepPeriods,
    Steps,
    is_prefilled,
    make_snapshot,
)

INFO = EngineInfo(
    model="m",
    tasks=("generate",),
    max_model_len=4096,
    max_num_seqs=16,
    max_num_batched_tokens=2048,
    num_kv_tokens=1000,
    block_size=16,
    is_external=True,
)


@dataclass
class Request:
    stream: int = 1
    num_prompt_tokens: int = 100
    num_new_tokens: int = 80
    num_output_tokens: int = 0
    has_token: bool = False
    is_streamed: bool = True
    sent_s: float = 1.0
    num_ahead: int = 0


def poll(num_others: int = 0, asked_s: float = 2.0, was_busy: bool = True, **fields) -> Poll:
    return Poll(Metrics(**fields), asked_s, asked_s + 0.001, num_others, was_busy)


def snapshot(sent: list[Request], look: Poll | None, now_s: float = 3.0):
    return make_snapshot(
        INFO, sent, look, seq=7, last_booking=9, num_steps=5, steps=Steps(), now_s=now_s
    )


def test_pending_prefill_is_what_has_no_token_yet():
    decoding = Request(has_token=True, num_output_tokens=5)
    made = snapshot([Request(), Request(num_new_tokens=20), decoding], poll(kv_cache_usage=0.5))
    assert made.num_pending_prefill_tokens == made.num_step_demand_tokens == 100
    assert (made.num_decoding_reqs, made.num_decode_context_tokens) == (1, 105)
    assert (made.num_running_reqs, made.num_waiting_reqs, made.num_inflight_reqs) == (3, 0, 3)
    assert made.num_free_kv_tokens == 500
    assert (made.seq, made.last_booking, made.num_steps_total) == (7, 9, 5)


def test_what_others_have_sent_counts_as_usual_prompts():
    look = poll(num_others=5, num_waiting=2, num_prompt_tokens=600, num_first_tokens=10)
    made = snapshot([Request()], look)
    assert made.num_pending_prefill_tokens == 80 + 2 * 60
    assert made.num_inflight_reqs == 6
    assert made.num_decoding_reqs == 3


def test_blocks_taken_since_the_last_look_are_counted():
    late = Request(sent_s=2.5, has_token=True, num_output_tokens=1)
    made = snapshot([late], poll(kv_cache_usage=0.5))
    assert made.num_free_kv_tokens == 500 - 101


def test_without_metrics_it_is_what_we_have_sent():
    made = snapshot([Request(has_token=True, num_output_tokens=100)], None)
    assert made.num_free_kv_tokens == 800
    assert made.kv_cache_usage == 0.2


def test_prefill_of_what_does_not_stream():
    """It shows by the server's first tokens, or after a while where nothing is told."""
    request = Request(is_streamed=False, num_ahead=7)
    assert not is_prefilled(request, poll(num_first_tokens=7), 3.0)
    assert is_prefilled(request, poll(num_first_tokens=8), 3.0)
    assert not is_prefilled(request, poll(num_first_tokens=8, asked_s=0.5), 3.0)
    assert not is_prefilled(request, None, 1.5)
    assert is_prefilled(request, None, 3.0)
    assert not is_prefilled(Request(), None, 99.0)  # a stream tells itself


def test_steps_are_averaged_between_looks_with_nothing_to_prefill():
    periods = StepPeriods()
    assert periods.add(poll(asked_s=1.0), is_prefilling=False) == Steps()
    middle = poll(asked_s=1.1, num_steps=4)
    assert periods.add(middle, is_prefilling=True) == Steps()
    end = poll(asked_s=1.5, num_steps=10, num_prompt_tokens=1000, num_output_tokens=30)
    steps = periods.add(end, is_prefilling=False)
    assert (round(steps.step_s, 6), steps.num_prefill_tokens, steps.num_decode_reqs) == (
        0.05,
        100,
        3,
    )


def test_a_pause_teaches_nothing():
    periods = StepPeriods()
    periods.add(poll(asked_s=1.0), is_prefilling=False)
    assert (
        periods.add(poll(asked_s=9.0, was_busy=False, num_steps=9), is_prefilling=False) == Steps()
    )
    again = periods.add(poll(asked_s=9.1, num_steps=11, num_output_tokens=2), is_prefilling=False)
    assert round(again.step_s, 6) == 0.05


def test_a_server_started_anew_teaches_nothing():
    periods = StepPeriods()
    periods.add(poll(asked_s=1.0, num_steps=50), is_prefilling=False)
    assert periods.add(poll(asked_s=1.1, num_steps=3), is_prefilling=False) == Steps()


def test_endless_prefill_is_counted_all_the_same():
    periods = StepPeriods()
    periods.add(poll(asked_s=1.0), is_prefilling=False)
    assert periods.add(poll(asked_s=2.9, num_steps=19), is_prefilling=True) == Steps()
    steps = periods.add(poll(asked_s=3.5, num_steps=25), is_prefilling=True)
    assert round(steps.step_s, 6) == 0.1


def test_a_step_that_lasts_over_many_looks_counts_whole():
    periods = StepPeriods()
    periods.add(poll(asked_s=1.0), is_prefilling=False)
    for asked_s in (2.0, 3.5, 5.0):
        assert periods.add(poll(asked_s=asked_s), is_prefilling=True) == Steps()
    end = poll(asked_s=7.0, num_steps=1, num_prompt_tokens=2000, num_output_tokens=2)
    assert periods.add(end, is_prefilling=False) == Steps(6.0, 2000, 2)


def test_a_server_that_has_worked_knows_its_rate():
    look = poll(prefill_s=2.0, num_prefilled_tokens=1000)
    assert snapshot([], look).prefill_tokens_per_s == 500.0
    assert snapshot([], poll()).prefill_tokens_per_s == 0.0
