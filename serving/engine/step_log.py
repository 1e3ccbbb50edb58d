"""A file of an engine's steps: what `headway profile` reads, and whoever wonders about a step."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from router.types import EngineSnapshot
from serving.stream.engine import Engine


class LoggedStep(msgspec.Struct, array_like=True):
    """The engine after a step."""

    ended_s: float  # monotonic clock of the machine, as the replica sees it
    snapshot: EngineSnapshot


class StepLog:
    """Writes a line of JSON after every step of one engine, then calls `then()`."""

    def __init__(self, engine: Engine, path: Path, then: Callable[[], None]) -> None:
        self._engine = engine
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb", buffering=0)  # whole lines, whoever reads along
        self._then = then
        self._encode = msgspec.json.Encoder().encode

    def on_step(self) -> None:
        """Write down the step that has just ended."""
        step = LoggedStep(time.monotonic(), self._engine.snapshot(0, []))
        self._file.write(self._encode(step) + b"\n")
        self._then()


def read(path: Path) -> Iterator[LoggedStep]:
    """Yield what stands in a file so far."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield msgspec.json.decode(line, type=LoggedStep)
