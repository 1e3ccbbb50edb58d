"""How every benchmark runs: to its end, or taken down in good order by a signal."""

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

import uvloop

from benchmarks.report.report import Report
from benchmarks.systems.system import BenchmarkError

T = TypeVar("T")


def run_to_the_end(run: Callable[[], Awaitable[T]]) -> T:
    """Return what `run()` returns.

    SIGINT, SIGTERM and SIGHUP cancel it, so that what it started is taken down
    on the way out. Raises `SystemExit`: 130 after a signal, 1 after a
    `BenchmarkError`; nothing is to be written then.
    """
    try:
        return uvloop.run(_until_told(run))
    except asyncio.CancelledError:
        print("Stopped before the end: nothing is written.")
        raise SystemExit(130) from None
    except BenchmarkError as error:
        print(f"{error}\nStopped before the end: nothing is written.", file=sys.stderr)
        raise SystemExit(1) from None


def run_and_judge(run: Callable[[], Awaitable[Report]]) -> int:
    """Run to the end, show and write the report; return 1 if a target was missed, else 0."""
    report = run_to_the_end(run)
    report.finish()
    return 0 if all(target["met"] for target in report.targets) else 1


async def _until_told(run: Callable[[], Awaitable[T]]) -> T:
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await run()
