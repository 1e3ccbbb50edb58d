"""What does an engine model serve? Jobs, each of one sequence or several."""

from collections.abc import Hashable
from collections.abc import Sequence as Row
from enum import Enum, auto
from typing import Final

import msgspec

from router.simulation.engine.kv_cache import BlockTable


class Job(msgspec.Struct, frozen=True, gc=False):
    """A request as an engine sees it. Jobs arrive in the order in which they are added."""

    id: str
    num_prompt_tokens: int
    num_output_tokens: int
    priority: int = 0  # vLLM's: lower is first
    # Chained hashes of the successive whole segments of prompt and output, as far as others may
    # share them.
    block_hashes: tuple[int, ...] = ()
    num_sequences: int = 1
    num_expected_cached_tokens: int = 0  # by the router, until the cache is looked up


class Progress(msgspec.Struct, frozen=True, gc=False):
    """A sequence that began or ended its output with this step."""

    job_id: str
    index: int  # of the job's sequences, from 0
    num_tokens: int  # emitted so far
    finished: bool
    num_cached_tokens: int  # of the prompt, found in the prefix cache
    num_preemptions: int = 0  # so far


class State(Enum):
    WAITING = auto()
    PREFILL = auto()
    DECODE = auto()
    STALLED = auto()  # decoding, yet not in the current step
    DONE = auto()


# Looked up once: compiled code, too, has to look up a member of an enumeration by its name.
WAITING: Final = State.WAITING
PREFILL: Final = State.PREFILL
DECODE: Final = State.DECODE
DONE: Final = State.DONE


class Sequence:
    """One output of a job, and how far it is computed."""

    __slots__ = (
        "admission",
        "block_table",
        "id",
        "index",
        "job",
        "joined_tick",
        "num_cached",
        "num_computed",
        "num_emitted",
        "num_output",
        "num_preemptions",
        "num_prompt",
        "serial",
        "state",
    )

    def __init__(self, job: Job, index: int, serial: int, keys: Row[Hashable]) -> None:
        self.id = f"{job.id}/{index}"
        self.job = job
        self.index = index
        self.serial = serial
        self.block_table = BlockTable(keys)
        self.state = WAITING
        self.num_prompt = job.num_prompt_tokens
        self.num_output = 0
        self.num_computed = 0  # while decoding: as it was when it joined the batch
        self.num_emitted = 0  # likewise
        self.joined_tick = 0
        self.num_cached = 0
        self.num_preemptions = 0
        self.admission = 0  # the how-manieth of the engine: the order among running ones

    @property
    def num_tokens(self) -> int:
        """Prompt and emitted tokens; out of date while decoding."""
        return self.num_prompt + self.num_emitted
