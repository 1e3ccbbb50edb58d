"""How fast a shared machine is at the moment, by work of known shape: it drifts in minutes."""

from dataclasses import dataclass

import numpy as np

from benchmarks.client import Client
from benchmarks.known_calls import KnownCalls
from benchmarks.profile import Pace, Profile
from benchmarks.subjects import BenchmarkError
from benchmarks.sweep import Fleet, simulate
from benchmarks.variant import OURS
from benchmarks.workload import Arrival, Workload

_NUM_PROMPT_TOKENS = 256
_NUM_OUTPUT_TOKENS = 24
_NUM_ROUNDS = 3
_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class KnownReply:
    """How long a reply of known shape takes from idle, seconds."""

    ttft_s: float
    rest_s: float  # from the first token to the last


class PaceProbe:
    """One prompt to each idle engine at once, prefilled and then decoded, by turns."""

    def __init__(self, urls: list[str], model: str, num_engines: int) -> None:
        self._urls = urls
        self._num_engines = num_engines
        self._calls = KnownCalls(model)

    async def reply(self) -> KnownReply:
        """Return how long such a reply takes, the mean; the engines must be idle."""
        records = []
        async with Client(self._urls) as client:
            for _ in range(_NUM_ROUNDS):
                records += [
                    client.send(self._calls.make(_NUM_PROMPT_TOKENS, _NUM_OUTPUT_TOKENS))
                    for _ in range(self._num_engines)
                ]
                await client.wait(_TIMEOUT_S)
        if errors := [record.error for record in records if not record.completed]:
            raise BenchmarkError(f"a request of known shape failed: {errors[0]}")
        ttft_s = sum(record.ttft_s for record in records) / len(records)
        whole_s = sum(record.last_s - record.sent_s for record in records) / len(records)
        return KnownReply(ttft_s, whole_s - ttft_s)


def pace(profile: Profile, num_engines: int, *replies: KnownReply) -> Pace:
    """Return by what the profile is `slowed` while such replies take so long, in the mean.

    Either part of a reply grows with both, and in proportion: two equations.
    """
    as_it_is, memory_twice, compute_twice = (
        _parts(expected_reply(profile.slowed(each), num_engines))
        for each in (Pace(1.0, 1.0), Pace(2.0, 1.0), Pace(1.0, 2.0))
    )
    slopes = np.column_stack([memory_twice - as_it_is, compute_twice - as_it_is])
    mean = np.mean([_parts(reply) for reply in replies], axis=0)
    memory, compute = 1.0 + np.linalg.solve(slopes, mean - as_it_is)
    return Pace(max(0.0, float(memory)), max(0.0, float(compute)))


def _parts(reply: KnownReply) -> np.ndarray:
    return np.array([reply.ttft_s, reply.rest_s])


def expected_reply(profile: Profile, num_engines: int) -> KnownReply:
    """Return how long such a reply would take by the profile."""
    arrivals = [
        Arrival(
            offset_s=0.0,
            num_prompt_tokens=_NUM_PROMPT_TOKENS,
            num_output_tokens=_NUM_OUTPUT_TOKENS,
            max_output_tokens=_NUM_OUTPUT_TOKENS,
        )
    ] * num_engines
    steady = profile.model_copy(update={"noise": 0.0})
    run = simulate(Workload.of("probe", arrivals), Fleet(steady, num_engines), OURS)
    ttft_s = float(run.ttft_s.mean())
    return KnownReply(ttft_s, float(run.e2e_s.mean()) - ttft_s)
