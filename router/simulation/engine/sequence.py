"""What an engine model serves: jobs, and the sequences that they consist of."""

from collections.abc import Hashable
from collections.abc import Sequence as Row
from dataclasses import dataclass
from enum import Enum, auto

from router.simulation.engine.kv_cache import Lease


@dataclass(frozen=True, slots=True)
class Job:
    """A request as an engine knows it. Jobs arrive in the order in which they are added."""

    id: str
    num_prompt_tokens: int
    num_output_tokens: int
    priority: int = 0  # vLLM's: lower is first
    # Of the successive whole segments of prompt and output, as far as somebody
    # else may share them: equal means equal up to there.
    block_hashes: tuple[int, ...] = ()
    num_sequences: int = 1
    num_expected_cached_tokens: int = 0  # the router's word, until the cache is looked at


@dataclass(frozen=True, slots=True)
class Progress:
    """A sequence that began or ended its output with this step."""

    job_id: str
    index: int  # of the job's sequences, from 0
    num_tokens: int  # emitted so far
    finished: bool
    num_cached_tokens: int  # of the prompt, found in the prefix cache
    num_preemptions: int = 0  # how often it had to begin again


class State(Enum):
    WAITING = auto()
    PREFILL = auto()
    DECODE = auto()
    STALLED = auto()  # decoding, yet not in the current step
    DONE = auto()


class Sequence:
    __slots__ = (
        "admission",
        "id",
        "index",
        "job",
        "joined_tick",
        "lease",
        "num_cached",
        "num_computed",
        "num_emitted",
        "num_output",
        "num_preemptions",
        "serial",
        "state",
    )

    def __init__(self, job: Job, index: int, serial: int, keys: Row[Hashable]) -> None:
        self.id = f"{job.id}/{index}"
        self.job = job
        self.index = index
        self.serial = serial
        self.lease = Lease(keys)
        self.state = State.WAITING
        self.num_output = 0
        self.num_computed = 0  # while decoding: when it joined
        self.num_emitted = 0  # likewise
        self.joined_tick = 0
        self.num_cached = 0
        self.num_preemptions = 0
        self.admission = 0  # counts all admissions of the engine: the order of running

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far; not while decoding."""
        return self.job.num_prompt_tokens + self.num_emitted
