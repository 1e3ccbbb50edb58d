"""How are an engine's steps kept in a file, for `headway profile` and for whoever studies them?"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from router import EngineSnapshot
from serving.stream.engine import Engine


class LoggedStep(msgspec.Struct, array_like=True):
    """The engine after a step."""

    ended_s: float  # monotonic clock of the machine, as the replica sees it
    snapshot: EngineSnapshot


class StepLog:
    """Writes a line of JSON after every step of one engine."""

    def __init__(self, engine: Engine, path: Path, then: Callable[[], None]) -> None:
        """Write into `path`; `then()` is called after each line."""
        self._engine = engine
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb", buffering=0)  # whole lines: others read meanwhile
        self._then = then
        self._encode = msgspec.json.Encoder().encode

    def on_step(self) -> None:
        """Write the step that has just ended."""
        step = LoggedStep(time.monotonic(), self._engine.snapshot(0, []))
        self._file.write(self._encode(step) + b"\n")
        self._then()


def read_steps(path: Path) -> Iterator[LoggedStep]:
    """Yield the whole lines that a file has so far."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield msgspec.json.decode(line, type=LoggedStep)
