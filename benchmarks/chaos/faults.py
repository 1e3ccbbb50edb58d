"""Faults of real engines: signals to their processes."""

import asyncio
import contextlib
import enum
import random
import signal
import time
from dataclasses import dataclass, field

import psutil

from benchmarks.systems.processes import engine_core

_ORPHAN_S = 30.0


class Fault(enum.Enum):
    """One way for a real engine to fail."""

    CORE = "engine core killed"
    ACTOR = "engine's actor killed"
    HANG = "engine core stopped, later continued"
    HANG_FOR_GOOD = "engine core stopped for good"

    @property
    def is_kill(self) -> bool:
        return self in (Fault.CORE, Fault.ACTOR)


def schedule(
    num_kills: int, num_pairs: int, num_hangs: int, rng: random.Random
) -> list[tuple[Fault, ...]]:
    """So many of each, in random order; one hang in four is for good.

    So many kills come in pairs: the second one hits the last engine, when it has taken over
    what the first one had.
    """
    kills = [Fault.CORE if number % 2 == 0 else Fault.ACTOR for number in range(num_kills)]
    rng.shuffle(kills)
    rounds: list[tuple[Fault, ...]] = [
        (kills.pop(), kills.pop()) for _ in range(min(num_pairs, num_kills // 2))
    ]
    rounds += [(kill,) for kill in kills]
    rounds += [
        (Fault.HANG_FOR_GOOD if number % 4 == 3 else Fault.HANG,) for number in range(num_hangs)
    ]
    rng.shuffle(rounds)
    return rounds


@dataclass
class Inflicted:
    """A fault, and what came of it. Times by the monotonic clock, which processes share."""

    fault: Fault
    replica_id: str
    num_streams: int  # that the engine had
    is_last: bool  # no other engine was at work
    at_s: float = field(default_factory=time.monotonic)
    recovered_s: float | None = None  # when as many engines were at work again
    outlived: list[str] = field(default_factory=list)  # its processes that did not go


class EngineProcesses:
    """An engine's actor and its core, found by the actor's pid."""

    def __init__(self, pid: int) -> None:
        """Raises `psutil.NoSuchProcess` or `LookupError` if one of them is gone."""
        self.actor = psutil.Process(pid)
        self.core = engine_core(self.actor)

    def inflict(self, fault: Fault) -> None:
        if fault is Fault.ACTOR:
            self.actor.kill()
        elif fault is Fault.CORE:
            self.core.kill()
        else:
            self.core.suspend()

    def go_on(self) -> None:
        """End a hang, unless somebody has ended the process."""
        with contextlib.suppress(psutil.Error):
            self.core.send_signal(signal.SIGCONT)

    async def outlived(self) -> list[str]:
        """Which of the two are still there some time after one of them was killed."""
        deadline_s = time.monotonic() + _ORPHAN_S
        while left := [each for each in (self.actor, self.core) if _lives(each)]:
            if time.monotonic() > deadline_s:
                break
            await asyncio.sleep(0.5)
        return [str(each) for each in left]


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
