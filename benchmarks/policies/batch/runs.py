"""One simulated run of interactive requests, with or without a batch, and its figures."""

import argparse
from dataclasses import replace

import msgspec
import numpy as np

from benchmarks.policies.batch.beside import BesideBatch, Scenario
from router import RequestClass
from router.simulation.engine.profile import Profile
from router.simulation.workload.lengths import LogNormal
from router.simulation.workload.synthetic import poisson
from router.simulation.workload.workload import Workload
from serving.capacity.profiles import load_profile
from serving.capacity.sweep import Fleet, simulated_capacity

PROMPTS = LogNormal(500.0, 0.8, high=8_000)  # of a line
REPLIES = LogNormal(200.0, 0.8, high=2_000)
_WARM = 0.1  # of a run, which fills empty engines, is left out
FIGURES = ("ttft_s", "tpot_s", "e2e_s")

Figures = dict[str, float]


def capacity(job: tuple[argparse.Namespace, int]) -> float:
    """Return how many requests per second engines carry. `job`: options and seed."""
    options, seed = job
    profile = load_profile(options.profile)
    workload = poisson(options.requests, seed).fitted(profile.max_model_len)
    return simulated_capacity(workload, Fleet(profile, options.engines), seed)


def interactive(profile: Profile, rate: float, num_requests: int, seed: int) -> Workload:
    """Return questions and documents of class interactive at a mean rate, requests per second."""
    workload = poisson(num_requests, seed).fitted(profile.max_model_len)
    arrivals = (
        msgspec.structs.replace(each, priority_class=RequestClass.INTERACTIVE)
        for each in workload.at_rate(rate).arrivals
    )
    return replace(workload.at_rate(rate), arrivals=tuple(arrivals))


def simulate(job: tuple[argparse.Namespace, float, float | None, int]) -> Figures:
    """Return the figures of one run. `job`: options, rate, max_slowdown (None: no batch), seed."""
    options, rate, max_slowdown, seed = job
    profile = load_profile(options.profile)
    workload = interactive(profile, rate, options.requests, seed)
    scenario = Scenario(profile, options.engines, max_slowdown, None, PROMPTS, REPLIES)
    beside = BesideBatch(workload, scenario, seed)
    run = beside.run()
    is_interactive = run.priority_class == RequestClass.INTERACTIVE.value
    counted = run.completed & is_interactive & (run.arrival_s >= _WARM * workload.duration_s)
    late = run.completed & (run.end_s >= _WARM * workload.duration_s)
    figures = {
        f"{name}_p{percent}": float(np.nanpercentile(getattr(run, name)[counted], percent))
        for name in FIGURES
        for percent in (50, 99)
    }
    tokens_per_s = run.num_output_tokens[late].sum() / ((1.0 - _WARM) * workload.duration_s)
    figures["output_tokens_per_s"] = float(tokens_per_s)
    figures["lines"] = float((run.completed & ~is_interactive).sum())
    figures["lines_open_p50"] = float(np.median(beside.limits)) if beside.limits else 0.0
    return figures
