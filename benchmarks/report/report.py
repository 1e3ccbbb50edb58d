"""What did a benchmark find? Tables on the screen and `results/NAME.json` on disk.

A report is written when the benchmark has run to its end, never before, and replaces the last one
in one step. A missed target is printed and recorded: it is a finding, not a failure of the
benchmark.
"""

import json
import math
import operator
import os
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from benchmarks.report import provenance
from benchmarks.report.console import make_console
from router.simulation.figures import brief
from serving.core_form import form

RESULTS = Path(__file__).parents[1] / "results"

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
}
_TARGET = re.compile(r"(>=|<=|>|<|==)\s*(-?[\d.]+)")


@dataclass(frozen=True)
class Spread:
    """A figure that was measured several times. Its median counts; the rest shows the noise."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(tuple(values))

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def as_json(self) -> dict[str, Any]:
        return {
            "median": _rounded(self.median),
            "min": _rounded(min(self.values)),
            "max": _rounded(max(self.values)),
            "values": [_rounded(value) for value in self.values],
        }

    def __str__(self) -> str:
        if min(self.values) == max(self.values):
            return brief(self.median)
        return f"{brief(self.median)} ({brief(min(self.values))} to {brief(max(self.values))})"


Figure = Spread | float | int | str | None


@dataclass
class Report:
    """Figures, targets and notes of one run. `name` names the file."""

    name: str
    kind: Literal["measured", "emulated", "simulated"]  # emulated: real time, no model
    seed: int
    config: dict[str, Any]
    tables: dict[str, list[dict[str, Figure]]] = field(default_factory=dict)
    targets: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add_row(self, table: str, **figures: Figure) -> None:
        """Add a row to a table. Keys are columns, their underscores shown as spaces."""
        self.tables.setdefault(table, []).append(figures)

    def add_target(self, name: str, value: Spread | float | None, target: str) -> None:
        """Compare a figure with `target`, e.g. ">= 50000". A spread counts by its median.

        `None` is a figure that could not be measured, and misses. Raises `ValueError` for a
        target that is no comparison.
        """
        if (parts := _TARGET.fullmatch(target)) is None:
            raise ValueError(f"{target!r} is no comparison with a number")
        number = value.median if isinstance(value, Spread) else value
        met = number is not None and _COMPARE[parts[1]](number, float(parts[2]))
        self.targets.append({"name": name, "value": _rounded(number), "target": target, "met": met})

    def add_note(self, text: str) -> None:
        """Add something that a reader must know to judge the figures."""
        self.notes.append(text)

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "seed": self.seed,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": provenance.commit(),
            "config": self.config,
            "hardware": provenance.hardware(),
            "versions": provenance.versions(),
            "core": form(),
            "figures": {
                title: [
                    {
                        key: value.as_json() if isinstance(value, Spread) else _rounded(value)
                        for key, value in row.items()
                    }
                    for row in rows
                ]
                for title, rows in self.tables.items()
            },
            "targets": self.targets,
            "notes": self.notes,
        }

    def show(self, console: Console | None = None) -> None:
        """Print the tables, the targets and the notes."""
        console = console or make_console()
        for title, rows in self.tables.items():
            console.print(_table(title, rows))
        for target in self.targets:
            found = "not measured" if target["value"] is None else brief(target["value"])
            word = "[green]met[/green]" if target["met"] else "[bold red]MISSED[/bold red]"
            console.print(f"{word}  {target['name']}: {found}, target {target['target']}")
        num_missed = sum(not target["met"] for target in self.targets)
        if self.targets:
            console.print(
                f"{num_missed} of {len(self.targets)} targets missed."
                if num_missed
                else f"All {len(self.targets)} targets met."
            )
        for note in self.notes:
            console.print(f"[dim]{note}[/dim]")

    def write(self, folder: Path = RESULTS) -> Path:
        """Write the file, whole or not at all. Return its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            unfinished.write_text(json.dumps(self.as_json(), indent=1, ensure_ascii=False) + "\n")
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
        return path

    def finish(self) -> None:
        """Show and write the report, when the benchmark has run to its end."""
        self.show()
        make_console().print(f"{self.kind}; written to {os.path.relpath(self.write())}")


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that `percent` of `values` do not exceed (nearest rank).

    Raises `ValueError` if there are none: a figure of nothing must not get into a report.
    `router.simulation.figures.percentile` takes arrays and returns `nan` then.
    """
    if not values:
        raise ValueError("no values")
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def _rounded(value: Any) -> Any:
    """Return a float with six digits; anything else as it is."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _table(title: str, rows: list[dict[str, Figure]]) -> Table:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(
            column.replace("_", " "), justify="right" if number else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    return table


def _cell(value: Figure) -> str:
    if value is None:
        return "-"
    if isinstance(value, float | int):
        return brief(value)
    return str(value)
