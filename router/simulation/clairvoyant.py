"""How well could a router do that knew everything? One pool of all engines, every length known.

The engines are merged into one that is as fast as all of them and has all their memory: no
placement can be wrong, every prefix is cached where it is needed, and the request with the least
work goes first, its true output length included. A request's first token then counts as no
earlier than on a single idle engine, which prefills a prompt without help.

What it relaxes makes it a lower bound, its order does not (`run_clairvoyant`).
"""

import numpy as np

from router import RouterSettings
from router.fleet.step_budget import ITL_TARGET_S
from router.simulation.engine.model import EngineModel
from router.simulation.engine.profile import Profile
from router.simulation.engine.unloaded import prefill_s
from router.simulation.events import Network
from router.simulation.journal import Run
from router.simulation.simulator import Simulation
from router.simulation.workload.workload import Arrival, Workload

NAME = "clairvoyant"


def pooled(profile: Profile, num_engines: int) -> Profile:
    """Return the profile of all engines merged into one.

    A step may hold as many times more, and each token costs as many times less.
    """
    return profile.model_copy(
        update={
            "name": f"{profile.name} ×{num_engines} pooled",
            "max_num_seqs": profile.max_num_seqs * num_engines,
            "max_num_batched_tokens": profile.max_num_batched_tokens * num_engines,
            "max_prefill_chunk": profile.max_prefill_chunk * num_engines,
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
    """Run the workload under the reference.

    Shortest first minimises the mean (Schrage 1968) and lets the largest requests wait: at high
    load a policy can have a lower p99 of long prompts.
    """
    pool = pooled(profile, num_engines)
    simulation = Simulation(
        workload,
        RouterSettings(policy="round_robin"),  # there is only one engine
        lambda rng: EngineModel(
            pool, rng, itl_target_s=ITL_TARGET_S, segment_tokens=segment_tokens
        ),
        1,
        network=Network(submit_s=0.0, reply_s=0.0),
        segment_tokens=segment_tokens,
        seed=seed,
        priority=lambda arrival: round(1e6 * work_s(arrival, profile)),
    )
    run = simulation.run()
    alone_s = prefill_s(run.num_prompt_tokens, profile)
    cached = run.num_cached_tokens / run.num_prompt_tokens
    first_s = np.maximum(run.first_s, run.arrival_s + alone_s * (1.0 - cached))
    run.first_s[:] = first_s
    run.end_s[:] = np.maximum(run.end_s, first_s)
    return run


def work_s(arrival: Arrival, profile: Profile) -> float:
    """Return about how much of an engine's time the request takes, by its tokens, seconds."""
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
