"""Figures of a run: SLO targets, percentiles, fairness, intervals, knees."""

import numpy as np
import pytest

from router.simulation.engine.unloaded import UnloadedTimes
from router.simulation.figures import (
    Promises,
    Slo,
    figures_of,
    interval,
    jain,
    knee,
    weighted_percentile,
)
from router.simulation.journal import Journal
from router.simulation.workload.workload import Arrival, Workload
from router.types import Outcome

WORKLOAD = Workload.of(
    "all at once",
    [Arrival(offset_s=0.0, num_prompt_tokens=10, num_output_tokens=1) for _ in range(20)],
)


def make_run(requests):
    """A run of (arrival, first token, end, prompt tokens, output tokens, tenant) each."""
    workload = Workload.of(
        "test",
        (
            Arrival(
                offset_s=arrival_s,
                num_prompt_tokens=prompt,
                num_output_tokens=output,
                tenant=tenant,
            )
            for arrival_s, _, _, prompt, output, tenant in requests
        ),
    )
    journal = Journal(workload)
    for number, (arrival_s, first_s, end_s, *_) in enumerate(requests):
        journal.placed_s[number] = arrival_s
        if end_s is None:
            journal.record_outcome(number, Outcome.EXPIRED, arrival_s + 9.0)
        else:
            journal.first_s[number] = first_s
            journal.record_outcome(number, Outcome.COMPLETED, end_s)
    return journal.to_run()


def test_slo_targets():
    """First token and flow must both be in time; one token has no flow; expired is not met."""
    run = make_run(
        [
            (0.0, 0.5, 1.5, 100, 11, ""),  # 0.1 s a token
            (1.0, 1.5, 2.5, 100, 41, ""),  # 0.025 s a token
            (2.0, 3.5, 4.0, 100, 41, ""),  # late
            (3.0, 3.5, 3.5, 100, 1, ""),
            (4.0, 0.0, None, 100, 5, ""),
        ]
    )
    assert Slo(1.0, 0.05).met(run).tolist() == [False, True, False, True, False]
    # The router's target is 0.5 s and 2 ms per prompt token: 0.7 s here.
    assert Slo(None, 1.0).met(run).tolist() == [True, True, False, True, False]


def test_figures():
    """By hand: nine requests after the first, which warms up; half of them wait ten times."""
    requests = [
        (float(n), n + (0.1 if n % 2 else 1.0), n + 2.0, 10 if n % 2 else 1000, 5, "ab"[n % 2])
        for n in range(10)
    ]
    found = figures_of(make_run(requests), Slo(0.5, 1.0))
    assert found["ttft_p50_s"] == pytest.approx(0.1)
    assert found["ttft_p99_s"] == pytest.approx(1.0)
    assert found["short_ttft_p99_s"] == pytest.approx(0.1)
    assert found["goodput"] == pytest.approx(5 / 9)
    assert found["short_goodput"] == 1.0
    assert found["e2e_p50_s"] == pytest.approx(2.0)
    assert found["completed"] == 1.0
    # Ended between the second arrival and the last: those that came at 0 to 7 s.
    assert found["output_tokens_per_s"] == pytest.approx(8 * 5 / 8.0)


def test_promises_are_multiples_of_what_an_idle_engine_takes():
    """First token within 2 times 0.5 s, each later one within 3 times 0.01 s."""
    run = make_run(
        [
            (0.0, 0.9, 1.0, 100, 11, ""),
            (1.0, 2.1, 2.2, 100, 11, ""),  # late
            (2.0, 2.9, 3.3, 100, 11, ""),  # slow
            (3.0, 3.9, 3.9, 100, 1, ""),
            (4.0, 0.0, None, 100, 5, ""),
        ]
    )
    unloaded = UnloadedTimes(np.full(5, 0.5), np.full(5, 0.01), np.full(5, 0.6))
    assert Promises(2.0, 3.0).kept(run, unloaded).tolist() == [True, False, False, True, False]
    found = figures_of(run, Promises(2.0, 3.0), unloaded=unloaded, window=(0.0, 1.0))
    assert found["goodput"] == pytest.approx(2 / 5)
    assert found["refused"] == pytest.approx(1 / 5)
    assert found["slowdown_p50"] == pytest.approx(1.0 / 0.6)
    assert found["slowdown_p99"] == pytest.approx(1.3 / 0.6)


def test_only_what_came_within_the_window_counts():
    """Requests by their order, gaps by when they were recorded."""
    journal = Journal(WORKLOAD)
    for number in range(20):
        journal.record_arrival(number)
        journal.record_steps(0.0, [float(number)], 1)
        journal.first_s[number] = float(number)
        journal.record_outcome(number, Outcome.COMPLETED, float(number))
    run = journal.to_run()
    assert run.gaps_s[run.gaps_within((0.1, 0.9))].tolist() == list(map(float, range(2, 18)))
    assert run.gaps_s[run.gaps_within((0.0, 1.0))].tolist() == list(map(float, range(20)))
    found = figures_of(run, Slo(1e9, 1e9), window=(0.1, 0.9))
    assert (found["ttft_p50_s"], found["ttft_p99_s"]) == (9.0, 17.0)
    assert found["itl_p99_s"] == 17.0


def test_shed():
    run = make_run([(0.0, 0.1, 1.0, 10, 5, "")] * 9 + [(9.0, 0.0, None, 10, 5, "")])
    found = figures_of(run, Slo(1.0, 1.0))
    assert found["num_shed"] == 1.0
    assert found["completed"] == 0.9


def test_fairness_over_tenants():
    """One tenant's requests meet the SLO and the other's never: Jain's index of (1, 0) is 1/2."""
    requests = [
        (n * 0.1, n * 0.1 + (0.1 if n % 2 else 5.0), n * 0.1 + 6.0, 10, 5, "ab"[n % 2])
        for n in range(100)
    ]
    assert figures_of(make_run(requests), Slo(1.0, 9.0))["fairness"] == pytest.approx(0.5)


def test_jain():
    assert jain([3.0, 3.0, 3.0]) == pytest.approx(1.0)
    assert jain([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert np.isnan(jain([0.0, 0.0]))


def test_weighted_percentile():
    """As if each value stood there as often as its count says."""
    values, counts = np.array([5.0, 1.0, 3.0]), np.array([1, 97, 2])
    assert weighted_percentile(values, counts, 50) == 1.0
    assert weighted_percentile(values, counts, 99) == 3.0
    assert weighted_percentile(values, counts, 99.5) == 5.0


def test_interval():
    """It covers the true mean about as often as it says."""
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        low, high = interval(rng.normal(10.0, 1.0, 30), seed)
        covered += low <= 10.0 <= high
    assert 85 <= covered <= 99
    assert interval([2.0, 2.0]) == (2.0, 2.0)


def test_knee():
    assert knee([0.5, 0.7, 0.9], [1.0, 1.5, 4.0]) == 0.7
    assert knee([0.5, 0.7, 0.9], [1.0, 1.5, 1.9]) is None
    assert knee([0.5], [1.0]) is None
