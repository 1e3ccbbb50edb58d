"""Sweeps of simulated runs: engines as vLLM comes, knees, and requests drawn for a run."""

import numpy as np
import pytest
from msgspec import structs

from router.simulation.figures import STEADY, Promises, weighted_percentile
from router.simulation.workload.synthetic import SYNTHETIC
from router.simulation.workload.workload import Workload
from serving.capacity import sweep
from serving.capacity.profiles import load_profile
from serving.capacity.sweep import Case, Fleet, Sweep, knee_rate, simulate, simulated_capacity

H100 = load_profile("h100")
QUESTIONS = SYNTHETIC["poisson"](1000, 0)


def test_stock_engines_serve_first_come_first_served_in_whole_steps():
    """Beside documents tokens come further apart there, under the very same policy."""
    workload = QUESTIONS.at_rate(50.0)
    ours, stock = (
        simulate(workload, Fleet(H100, 2), f"round_robin{engines}") for engines in ("", "@stock")
    )
    assert ours.completed.all()
    assert stock.completed.all()
    itl_p99_s = [weighted_percentile(run.gaps_s, run.gap_counts, 99) for run in (ours, stock)]
    assert itl_p99_s[1] > 1.2 * itl_p99_s[0]


def test_waits_are_steep_near_the_capacity_and_not_at_half_of_it():
    fleet = Fleet(H100, 2)
    knee = knee_rate(QUESTIONS, fleet, 600, 1)
    capacity = simulated_capacity(QUESTIONS, fleet)
    assert 0.3 * capacity < knee <= capacity
    waits_s = [
        np.percentile(simulate(QUESTIONS.at_rate(rate), fleet, "least_requests@stock").ttft_s, 99)
        for rate in (0.3 * capacity, 1.3 * capacity)
    ]
    assert waits_s[1] > 3.0 * waits_s[0]


def test_a_case_draws_its_requests():
    """The same ones for every policy of a repeat, at the rate and from the copies asked for."""
    cases = [
        Case("questions", 2, 0.5, 30.0, variant, 0, seed, num_requests=200)
        for variant in ("round_robin@stock", "headway")
        for seed in (1, 2)
    ]
    with Sweep({"questions": QUESTIONS}, H100, Promises(), window=STEADY, num_processes=1) as sweep:
        found = {case: figures for case, figures, _ in sweep.run(cases)}
    assert set(found) == set(cases)
    for figures in found.values():
        assert figures["completed"] == 1.0
        assert figures["num_copies"] == 3.0  # of 10 requests a second each
        assert figures["time_scale"] == pytest.approx(1.0, rel=0.05)
        assert 0.0 < figures["goodput"] <= 1.0
        assert figures["slowdown_p50"] >= 0.9


def test_the_knee_of_long_replies_is_searched_in_long_runs(monkeypatch):
    """60 requests would all have come before the first reply has ended."""
    durations_s = []

    def noted(workload, *args, **options):
        durations_s.append(workload.duration_s)
        return simulate(workload, *args, **options)

    monkeypatch.setattr(sweep, "simulate", noted)
    arrivals = [structs.replace(each, num_output_tokens=800) for each in QUESTIONS.arrivals]
    knee_rate(Workload.of("long", arrivals[:300]), Fleet(H100, 1), 60, 1)
    at_once, *others = durations_s
    assert at_once == 0.0
    assert min(others) > 100.0  # a reply takes 5 s and more
