"""How fast a shared machine is at the moment, by work of known shape: it drifts in minutes."""

from benchmarks.client import Client
from benchmarks.known_calls import KnownCalls
from benchmarks.profile import Profile
from benchmarks.subjects import BenchmarkError
from benchmarks.sweep import Fleet, simulate
from benchmarks.variant import OURS
from benchmarks.workload import Arrival, Workload

_NUM_PROMPT_TOKENS = 256
_NUM_OUTPUT_TOKENS = 24
_NUM_ROUNDS = 2
_TIMEOUT_S = 120.0


class PaceProbe:
    """One prompt to each idle engine at once, prefilled and then decoded, by turns."""

    def __init__(self, urls: list[str], model: str, num_engines: int) -> None:
        self._urls = urls
        self._num_engines = num_engines
        self._calls = KnownCalls(model)

    async def reply_s(self) -> float:
        """Return how long such a reply takes, seconds, the mean; the engines must be idle."""
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
        return sum(record.last_s - record.sent_s for record in records) / len(records)


def slowness(profile: Profile, num_engines: int, reply_s: float) -> float:
    """Return by what the profile is `slowed` while such a reply takes so long."""
    as_it_is_s, twice_s = (
        expected_reply_s(profile.slowed(factor), num_engines) for factor in (1.0, 2.0)
    )
    return max(0.0, 1.0 + (reply_s - as_it_is_s) / (twice_s - as_it_is_s))


def expected_reply_s(profile: Profile, num_engines: int) -> float:
    """Return how long such a reply would take by the profile, seconds."""
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
    return float(run.e2e_s.mean())
