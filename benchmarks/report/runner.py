"""How does a benchmark run? To its end, or until a signal or a failure ends it in good order."""

import sys
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from benchmarks.report.console import make_console
from benchmarks.report.report import Report
from serving.capacity.launch import MeasureError
from serving.cli.interrupts import run_until_stopped

T = TypeVar("T")

console = make_console()


def run_to_the_end(run: Callable[[], Awaitable[T]]) -> T:
    """Run `run()` and return what it returns.

    SIGINT, SIGTERM and SIGHUP cancel it. Raises `SystemExit`: 130 after a signal, 1 after a
    `MeasureError`. Nothing may be written then.
    """
    try:
        return run_until_stopped(run)
    except MeasureError as error:
        text = f"{error}\n{error.log}".rstrip()
        print(f"{text}\nStopped before the end: nothing is written.", file=sys.stderr)
        raise SystemExit(1) from None


def run_and_judge(run: Callable[[], Awaitable[Report]]) -> int:
    """Run to the end, show and write the report. Return 1 if a target was missed, else 0."""
    report = run_to_the_end(run)
    report.finish()
    return 0 if all(target["met"] for target in report.targets) else 1


def print_progress(text: str) -> None:
    """Print a line of progress with the time of day."""
    console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] {text}", highlight=False, soft_wrap=True)
