"""How are real engines made to fail? By signals to their processes."""

import asyncio
import contextlib
import enum
import random
import signal
import time
from dataclasses import dataclass, field

import psutil

from benchmarks.systems.processes import engine_core

_EXIT_TIMEOUT_S = 30.0  # of the other process, when one of an engine's two was killed


class ProcessFault(enum.Enum):
    """One way for a real engine to fail, by what is done to its processes."""

    CORE = "engine core killed"
    ACTOR = "engine's actor killed"
    HANG = "engine core stopped, later continued"
    HANG_FOR_GOOD = "engine core stopped for good"

    @property
    def is_kill(self) -> bool:
        return self in (ProcessFault.CORE, ProcessFault.ACTOR)


def schedule_faults(
    num_kills: int, num_pairs: int, num_hangs: int, rng: random.Random
) -> list[tuple[ProcessFault, ...]]:
    """Return so many kills and hangs in random order; one hang in four is for good.

    `num_pairs` times two kills belong together: the second one hits the last engine, after it has
    taken over the first one's requests.
    """
    kills = [
        ProcessFault.CORE if number % 2 == 0 else ProcessFault.ACTOR for number in range(num_kills)
    ]
    rng.shuffle(kills)
    rounds: list[tuple[ProcessFault, ...]] = [
        (kills.pop(), kills.pop()) for _ in range(min(num_pairs, num_kills // 2))
    ]
    rounds += [(kill,) for kill in kills]
    rounds += [
        (ProcessFault.HANG_FOR_GOOD if number % 4 == 3 else ProcessFault.HANG,)
        for number in range(num_hangs)
    ]
    rng.shuffle(rounds)
    return rounds


@dataclass
class InjectedFault:
    """A fault and its consequences. Times are of the monotonic clock, which processes share."""

    fault: ProcessFault
    replica_id: str
    num_streams: int  # of the engine at that moment
    is_last: bool  # no other engine was running
    at_s: float = field(default_factory=time.monotonic)
    recovered_s: float | None = None  # when all engines were running again
    survivors: list[str] = field(default_factory=list)  # its processes that did not exit


class EngineProcesses:
    """The two processes of an engine: its actor, and the core where vLLM computes."""

    def __init__(self, pid: int) -> None:
        """Find both by the actor's pid. Raises `psutil.Error` or `LookupError` if one is gone."""
        self.actor = psutil.Process(pid)
        self.core = engine_core(self.actor)

    def inject(self, fault: ProcessFault) -> None:
        if fault is ProcessFault.ACTOR:
            self.actor.kill()
        elif fault is ProcessFault.CORE:
            self.core.kill()
        else:
            self.core.suspend()

    def continue_core(self) -> None:
        """End a hang, unless the process has been ended meanwhile."""
        with contextlib.suppress(psutil.Error):
            self.core.send_signal(signal.SIGCONT)

    async def wait_for_exit(self) -> list[str]:
        """Wait until both processes are gone, 30 s at most. Return those that are not."""
        deadline_s = time.monotonic() + _EXIT_TIMEOUT_S
        while left := [each for each in (self.actor, self.core) if _lives(each)]:
            if time.monotonic() > deadline_s:
                break
            await asyncio.sleep(0.5)
        return [str(each) for each in left]


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
