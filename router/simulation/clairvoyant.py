"""A reference that no router can be: one pool of all engines, and every length known.

The engines are merged into one that is as fast as all of them and has all their
memory: no placement can be wrong, every prefix is cached where it is needed, and it
takes the request with the least work first, true output length included. A request's
first token then counts as no earlier than it would come on a single idle engine, which
prefills a prompt without help.

A lower bound in what it relaxes, but not in its order: shortest first makes the mean
small (Schrage 1968) and the largest requests wait, so at high load a policy can have a
lower p99 of long prompts.
"""

import random

import numpy as np

from router import RouterSettings
from router.simulation.engine.model import EngineModel
from router.simulation.engine.profile import Profile
from router.simulation.engine.sequence import Job
from router.simulation.events import Network
from router.simulation.journal import Run
from router.simulation.simulator import Simulation
from router.simulation.workload.workload import Arrival, Workload

NAME = "clairvoyant"


def pooled(profile: Profile, num_engines: int) -> Profile:
    """Return the profile of all engines in one: what a step may hold times their number,
    what each token costs divided by it."""
    return profile.model_copy(
        update={
            "name": f"{profile.name} ×{num_engines} pooled",
            "max_num_seqs": profile.max_num_seqs * num_engines,
            "max_num_batched_tokens": profile.max_num_batched_tokens * num_engines,
            "max_prefill_chunk": profile.prefill_chunk * num_engines,
            "num_kv_tokens": profile.num_kv_tokens * num_engines,
            "s_per_token": profile.s_per_token / num_engines,
            "s_per_decode_req": profile.s_per_decode_req / num_engines,
            "s_per_context_token": profile.s_per_context_token / num_engines,
            "s_per_prefill_pair": profile.s_per_prefill_pair / num_engines,
        }
    )


def run_clairvoyant(
    workload: Workload, profile: Profile, num_engines: int, *, seed: int, segment_tokens: int
) -> Run:
    """Return what the reference makes of the workload."""
    pool = pooled(profile, num_engines)
    simulation = Simulation(
        workload,
        RouterSettings(policy="round_robin"),  # there is but one to choose
        lambda rng: EngineModel(pool, rng, paces=True, segment_tokens=segment_tokens),
        1,
        network=Network(submit_s=0.0, reply_s=0.0),
        segment_tokens=segment_tokens,
        seed=seed,
        priority=lambda arrival: round(1e6 * work_s(arrival, profile)),
    )
    run = simulation.run()
    sizes, which = np.unique(run.num_prompt_tokens, return_inverse=True)
    alone_s = np.array([prefill_s(int(size), profile) for size in sizes])[which]
    cached = run.num_cached_tokens / run.num_prompt_tokens
    first_s = np.maximum(run.first_s, run.arrival_s + alone_s * (1.0 - cached))
    run.first_s[:] = first_s
    run.end_s[:] = np.maximum(run.end_s, first_s)
    return run


def prefill_s(num_prompt_tokens: int, profile: Profile) -> float:
    """Return how long one engine with nothing else to do takes for the first token, seconds."""
    engine = EngineModel(profile.model_copy(update={"noise": 0.0}), random.Random(0))
    engine.add(Job("alone", num_prompt_tokens, 1))
    now_s = 0.0
    while (step_s := engine.begin_step(now_s)) is not None:
        now_s += step_s
        engine.end_step(now_s)
    return now_s


def work_s(arrival: Arrival, profile: Profile) -> float:
    """Return what the request takes of an engine, about: its tokens' share of steps, seconds."""
    num_pairs = arrival.num_prompt_tokens**2 / 2.0
    num_context = arrival.num_output_tokens * (
        arrival.num_prompt_tokens + arrival.num_output_tokens / 2.0
    )
    return (
        profile.s_per_token * (arrival.num_prompt_tokens + arrival.num_output_tokens)
        + profile.s_per_decode_req * arrival.num_output_tokens
        + profile.s_per_prefill_pair * num_pairs
        + profile.s_per_context_token * num_context
    )
