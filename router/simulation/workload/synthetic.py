"""Which workloads are there without a trace? Synthetic ones, drawn from a seed."""

from collections.abc import Callable, Mapping

import numpy as np

from router.simulation.workload import arrivals
from router.simulation.workload.lengths import LogNormal, Mixture, TokenCounts
from router.simulation.workload.sessions import CodingAgents, Conversations
from router.simulation.workload.workload import Arrival, Workload

# Four prompts of five are questions, one is a document.
PROMPTS = Mixture(
    (LogNormal(120.0, 0.9, high=8_000), LogNormal(3_000.0, 0.8, high=30_000)), (0.8, 0.2)
)
REPLIES = LogNormal(120.0, 0.9, high=2_000)
_RATE = 10.0  # arbitrary: the wanted rate comes by scaling
_CV = 4.0
_SPIKE = 4.0
_TURNS_PER_SESSION = Conversations().mean_num_turns
_AGENTS_RATE = 0.02  # of sessions: here the speed counts, for a session lasts minutes
_TURNS_PER_AGENT = 30  # fewer than asked for: contexts come to their ends


def of(
    name: str,
    times_s: np.ndarray,
    seed: int,
    prompts: TokenCounts = PROMPTS,
    replies: TokenCounts = REPLIES,
) -> Workload:
    """Return requests at these times, with drawn sizes. `times_s`: [num_requests]."""
    rng = np.random.default_rng([seed, 2])
    num_requests = len(times_s)
    sizes = zip(
        times_s, prompts.draw(rng, num_requests), replies.draw(rng, num_requests), strict=True
    )
    return Workload.of(
        name,
        (
            Arrival(
                offset_s=float(time_s), num_prompt_tokens=int(prompt), num_output_tokens=int(reply)
            )
            for time_s, prompt, reply in sizes
        ),
    )


def poisson(num_requests: int, seed: int) -> Workload:
    """Return questions and documents with independent arrivals."""
    rng = np.random.default_rng(seed)
    return of("poisson", arrivals.poisson(rng, _RATE, num_requests), seed)


def bursty(num_requests: int, seed: int) -> Workload:
    """Return the same with clustered arrivals: gaps with a coefficient of variation of 4."""
    rng = np.random.default_rng(seed)
    return of("bursty", arrivals.bursty(rng, _RATE, _CV, num_requests), seed)


def ramp(num_requests: int, seed: int) -> Workload:
    """Return the same at a rate that rises from 0 to twice the mean."""
    rng = np.random.default_rng(seed)
    times_s = arrivals.ramp(rng, 0.0, 2.0 * _RATE, num_requests / _RATE)
    return of("ramp", times_s, seed)


def spike(num_requests: int, seed: int) -> Workload:
    """Return the same, at four times the rate for a tenth of the time."""
    rng = np.random.default_rng(seed)
    duration_s = num_requests / (_RATE * (1.0 + 0.1 * (_SPIKE - 1.0)))
    times_s = arrivals.spike(rng, _RATE, _SPIKE, 0.1 * duration_s, duration_s)
    return of("spike", times_s, seed)


def conversations(num_requests: int, seed: int) -> Workload:
    """Return sessions of several turns with shared system prompts."""
    num_sessions = round(num_requests / _TURNS_PER_SESSION)
    return Workload.of("conversations", Conversations().arrivals(_RATE, num_sessions, seed))


def agents(num_requests: int, seed: int) -> Workload:
    """Return sessions of coding agents, with contexts of 10,000 to 120,000 tokens."""
    num_sessions = max(1, round(num_requests / _TURNS_PER_AGENT))
    return Workload.of("agents", CodingAgents().arrivals(_AGENTS_RATE, num_sessions, seed))


SYNTHETIC: Mapping[str, Callable[[int, int], Workload]] = {
    "poisson": poisson,
    "bursty": bursty,
    "ramp": ramp,
    "spike": spike,
    "conversations": conversations,
    "agents": agents,
}
