"""Has a token or a request become grossly more expensive? Half a minute tells.

What counts are ratios to the floor of the same run, of CPU time at given rates: a slow or busy
machine is slow for both. The last run's row is compared with the one before it of the same form of
the core. The rows of all commits that were measured stay in `results/overhead-short.json`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.overhead import phases
from benchmarks.overhead.figures import Figures
from benchmarks.overhead.phases import Durations, PhaseRunner
from benchmarks.report import provenance
from benchmarks.report.report import RESULTS, Report
from benchmarks.systems.system import Floor, NullHeadway
from serving.core_form import form

NAME = "overhead-short"
NUM_ENGINES = 2
# Ratios of two runs of the same code differed by up to a third on a machine whose cores others kept
# busy, and a slow machine's caches differ.
MAX_GROWTH = 2.0
_FRONT = "own"
_DURATIONS = Durations(1, idle_s=1.5, slow_s=2.0, busy_s=2.0, short_s=2.0)
_HISTORY = "Over the floor's, by commit"
_MAX_ROWS = 60

Row = dict[str, Any]


async def measure() -> tuple[Figures, Row]:
    """Measure the path and the floor in turns. Return all figures, and the row of this run."""
    figures = Figures()
    async with NullHeadway(_FRONT, NUM_ENGINES) as system, Floor(NUM_ENGINES) as floor_system:
        path, floor = (PhaseRunner(each, _DURATIONS) for each in (system, floor_system))
        await path.measure_idle()
        for rate, span_s in ((phases.SLOW, _DURATIONS.slow_s), (phases.BUSY, _DURATIONS.busy_s)):
            for runner in (path, floor):
                window, _ = await runner.stream_at_rate(rate, span_s)
                figures.add_rate(runner.system.name, rate, window)
        for runner in (path, floor):
            window = await runner.send_spaced_requests(_DURATIONS.short_s)
            figures.add_spaced(runner.system.name, window)
    commit = provenance.commit()
    short_id = (commit["id"] or "unknown")[:12] + ("+" if commit["dirty"] else "")
    ratios = {name: float(f"{value:.3g}") for name, value in figures.over_floor(_FRONT).items()}
    return figures, {"commit": short_id, "core": form(), **ratios}


def read_history(folder: Path = RESULTS) -> list[Row]:
    """Return the rows of all runs that are kept, the oldest first."""
    path = folder / f"{NAME}.json"
    return json.loads(path.read_text())["figures"][_HISTORY] if path.exists() else []


def last_comparable(history: Sequence[Row], row: Row) -> Row | None:
    """Return the newest row of the same form of the core, None if there is none."""
    return next((each for each in reversed(history) if each["core"] == row["core"]), None)


def compare(row: Row, before: Row | None) -> tuple[list[str], list[str]]:
    """Return a line on each ratio, and the names of those that have grown grossly."""
    lines, grown = [], []
    for name, ratio in row.items():
        if not isinstance(ratio, float):
            continue
        last = (before or {}).get(name)
        shown = "none before" if last is None else f"{last:.3g} at {before['commit']}"  # type: ignore[index]
        lines.append(f"{name}, over the floor's: {ratio:.3g} ({shown}; core {row['core']})")
        if last is not None and ratio > MAX_GROWTH * last:
            grown.append(name)
    return lines, grown


def make_report(figures: Figures, row: Row, history: Sequence[Row]) -> Report:
    """Return the report of this run, with the rows of earlier ones."""
    report = Report(NAME, "measured", 0, {"num_engines": NUM_ENGINES, **vars(_DURATIONS)})
    figures.fill(report)
    same = {"commit": row["commit"], "core": row["core"]}
    others = [each for each in history if not same.items() <= each.items()]
    for each in [*others, row][-_MAX_ROWS:]:
        report.add_row(_HISTORY, **each)
    return report
