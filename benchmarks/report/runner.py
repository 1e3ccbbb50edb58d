"""How every benchmark runs: to its end, or taken down in good order by a signal."""

import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

from benchmarks.report.report import Report
from serving.capacity.launch import MeasureError
from serving.cli.interrupts import run_until_stopped

T = TypeVar("T")


def run_to_the_end(run: Callable[[], Awaitable[T]]) -> T:
    """Return what `run()` returns.

    SIGINT, SIGTERM and SIGHUP cancel it. Raises `SystemExit`: 130 after a signal, 1 after a
    `MeasureError`; nothing is to be written then.
    """
    try:
        return run_until_stopped(run)
    except MeasureError as error:
        text = f"{error}\n{error.log}".rstrip()
        print(f"{text}\nStopped before the end: nothing is written.", file=sys.stderr)
        raise SystemExit(1) from None


def run_and_judge(run: Callable[[], Awaitable[Report]]) -> int:
    """Run to the end, show and write the report; return 1 if a target was missed, else 0."""
    report = run_to_the_end(run)
    report.finish()
    return 0 if all(target["met"] for target in report.targets) else 1
