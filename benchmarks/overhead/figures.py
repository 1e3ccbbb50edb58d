"""Which figures does the overhead benchmark report, in which tables, against which targets?"""

from collections import defaultdict
from typing import NamedTuple

from benchmarks.overhead.phases import (
    BUSY,
    LOAD_ROLE,
    OTHERS_ROLE,
    SLOW,
    SPACED_PER_S,
    Rate,
    Window,
)
from benchmarks.report.report import Report, Spread
from benchmarks.systems.processes import OTHER_ROLE

FLOOR = "floor"
ROLES = ("gateway", "front", "engines", OTHER_ROLE, LOAD_ROLE)
_PATH = "gateway + front"
# When other programs take more than this, the figures tell of them. Ray takes about 0.1, idle
# beside the floor.
_QUIET_CORES = 0.25

_TTFT = "Time to first token, ms"
_RATES = "Tokens per second, 200 streams"
_SLOW_CPU = f"CPU µs per token at {SLOW} tokens/s, net of idle"
_BUSY_CPU = f"CPU µs per token at {BUSY} tokens/s, net of idle"
_FLAT_OUT_CPU = "CPU µs per token flat out, net of idle"
_SHORT = "Short requests (1 to 4 tokens)"
_SPACED = f"CPU µs per short request, {SPACED_PER_S} per second"
_OPEN_STREAMS = "1,000 open streams"
_OTHERS = "Cores taken by strangers meanwhile"
_OVER_FLOOR = "Over the floor's of the same run"


class _Target(NamedTuple):
    """What a row is to be. `name` is that of the target in result files."""

    name: str
    table: str
    row: str
    target: str


_TARGETS = (
    _Target("tokens/s flat out", _RATES, "flat out", ">= 50000"),
    _Target(f"CPU µs per token at {SLOW} tokens/s, {_PATH}", _SLOW_CPU, _PATH, "<= 50"),
    _Target(f"CPU µs per token at {BUSY} tokens/s, {_PATH}", _BUSY_CPU, _PATH, "<= 20"),
    _Target(f"CPU µs per token flat out, {_PATH}", _FLAT_OUT_CPU, _PATH, "<= 8"),
    _Target("tokens/s, 20,000 asked for", _RATES, f"asked for {BUSY}", ">= 19000"),
    _Target("added TTFT p50, ms", _TTFT, "p50 added to the floor's", "<= 0.5"),
    _Target("added TTFT p99, ms", _TTFT, "p99 added to the floor's", "<= 1.5"),
    _Target("short requests/s, whole replies", _SHORT, "whole, per second", ">= 8000"),
    _Target("short requests/s, streamed replies", _SHORT, "streamed, per second", ">= 8000"),
)
_WORST_TARGETS = tuple(  # of all repeats
    _Target(f"1,000 open streams, {row}, worst", _OPEN_STREAMS, row, target)
    for row, target in (
        ("gateway MB added", "<= 200"),
        ("gateway MB with them", "<= 200"),
        ("left in the engines 1 s after all vanished", "<= 0"),
    )
)


_CPU_OF_RATE = {SLOW: _SLOW_CPU, BUSY: _BUSY_CPU}


class _Ratio(NamedTuple):
    """A figure of ours that is divided by one of the floor's, whose whole path is its engine."""

    name: str
    table: str
    row: str
    floor_row: str


_RATIOS = (
    _Ratio(f"CPU per token at {SLOW}", _SLOW_CPU, _PATH, "engines"),
    _Ratio(f"CPU per token at {BUSY}", _BUSY_CPU, _PATH, "engines"),
    _Ratio("CPU per token flat out", _FLAT_OUT_CPU, _PATH, "engines"),
    _Ratio("CPU per short request", _SHORT, f"whole, CPU µs: {_PATH}", "whole, CPU µs: engines"),
    _Ratio(
        "CPU per short stream", _SHORT, f"streamed, CPU µs: {_PATH}", "streamed, CPU µs: engines"
    ),
    _Ratio(f"CPU per short request, {SPACED_PER_S}/s", _SPACED, _PATH, "engines"),
    _Ratio("short requests per second", _SHORT, "whole, per second", "whole, per second"),
    _Ratio("TTFT p50 at low load", _TTFT, "p50 at low load", "p50 at low load"),
)


class Figures:
    """All figures of all paths, one value per repeat. Tables and rows keep their order."""

    def __init__(self) -> None:
        self._tables: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(
            lambda: defaultdict(lambda: defaultdict(list))
        )

    def add(self, path: str, table: str, row: str, value: float) -> None:
        self._tables[table][row][path].append(value)

    def get(self, path: str, table: str, row: str) -> Spread | None:
        values = self._tables.get(table, {}).get(row, {}).get(path)
        return Spread.of(values) if values else None

    def add_open_streams(
        self, path: str, before_mb: float, during_mb: float, num_left: int
    ) -> None:
        self.add(path, _OPEN_STREAMS, "gateway MB before", before_mb)
        self.add(path, _OPEN_STREAMS, "gateway MB with them", during_mb)
        self.add(path, _OPEN_STREAMS, "gateway MB added", during_mb - before_mb)
        self.add(path, _OPEN_STREAMS, "left in the engines 1 s after all vanished", num_left)

    def add_ttft(self, path: str, percent: int, ours_ms: float, floor_ms: float) -> None:
        self.add(FLOOR, _TTFT, f"p{percent} at low load", floor_ms)
        self.add(path, _TTFT, f"p{percent} at low load", ours_ms)
        self.add(path, _TTFT, f"p{percent} added to the floor's", ours_ms - floor_ms)

    def add_lateness(self, path: str, p99_ms: float) -> None:
        """Add how late the load generator sent: noise of its own, in no other figure."""
        self.add(path, _TTFT, "p99 of sending late", p99_ms)

    def add_ttft_when_busy(self, path: str, p50_ms: float, p99_ms: float) -> None:
        self.add(path, _TTFT, f"p50 at {BUSY} tokens/s", p50_ms)
        self.add(path, _TTFT, f"p99 at {BUSY} tokens/s", p99_ms)

    def add_rate(self, path: str, rate: Rate, window: Window) -> None:
        """Add what came of asking for so many tokens per second."""
        if rate.num_streams == BUSY.num_streams:  # else it would not fit the table's title
            self._add_tokens(path, f"asked for {rate}", window)
        if rate in _CPU_OF_RATE:
            self._add_cpu(path, _CPU_OF_RATE[rate], "", window, window.num_tokens)
        self._add_others(path, window)

    def add_flat_out(self, path: str, window: Window) -> None:
        self._add_tokens(path, "flat out", window)
        self._add_cpu(path, _FLAT_OUT_CPU, "", window, window.num_tokens)
        self._add_others(path, window)

    def add_short(self, path: str, kind: str, window: Window) -> None:
        self.add(path, _SHORT, f"{kind}, per second", window.requests_per_s)
        self._add_cpu(path, _SHORT, f"{kind}, CPU µs: ", window, window.num_requests)
        self._add_others(path, window)

    def add_spaced(self, path: str, window: Window) -> None:
        self._add_cpu(path, _SPACED, "", window, window.num_requests)
        self._add_others(path, window)

    def over_floor(self, path: str) -> dict[str, float]:
        """Return what was measured of both, over the floor's: medians of the same run."""
        ratios = {}
        for ratio in _RATIOS:
            ours = self.get(path, ratio.table, ratio.row)
            floor = self.get(FLOOR, ratio.table, ratio.floor_row)
            if ours is not None and floor is not None and floor.median > 0.0:
                ratios[ratio.name] = ours.median / floor.median
        return ratios

    def fill(self, report: Report) -> None:
        """Add the tables to the report, and what impairs them."""
        columns = {FLOOR: None}  # first, whichever phase came first
        for rows in self._tables.values():
            for paths in rows.values():
                columns.update(dict.fromkeys(paths))
        targets = {(each.table, each.row): each.target for each in (*_TARGETS, *_WORST_TARGETS)}
        for table, rows in self._tables.items():
            for row in rows:
                spreads = {path: self.get(path, table, row) for path in columns}
                beside = {"target": targets[table, row]} if (table, row) in targets else {}
                report.add_row(table, figure=row, **spreads, **beside)
        ratios = {path: self.over_floor(path) for path in columns if path != FLOOR}
        for ratio in _RATIOS:
            found = {path: each[ratio.name] for path, each in ratios.items() if ratio.name in each}
            if found:
                report.add_row(_OVER_FLOOR, figure=ratio.name, **found)
        most = max(
            max(values) for rows in self._tables[_OTHERS].values() for values in rows.values()
        )
        if most > _QUIET_CORES:
            report.add_note(
                f"Other programs took up to {most:.1f} cores meanwhile: rates are lower bounds and "
                "times are upper bounds, but CPU per token looks better than it is, because late "
                "tokens are sent together."
            )
        report.add_note(
            "Beyond its capacity a path merges tokens, as vLLM does: 'per HTTP chunk' says how "
            "many. The floor merges none, so its rate flat out is no upper bound."
        )

    def set_targets(self, report: Report, path: str) -> None:
        """Compare the figures of one path with the targets."""
        for each in _TARGETS:
            report.add_target(each.name, self.get(path, each.table, each.row), each.target)
        for each in _WORST_TARGETS:
            spread = self.get(path, each.table, each.row)
            worst = max(spread.values) if spread is not None else None
            report.add_target(each.name, worst, each.target)

    def _add_tokens(self, path: str, what: str, window: Window) -> None:
        self.add(path, _RATES, what, window.tokens_per_s)
        self.add(path, _RATES, f"{what}: per HTTP chunk", window.num_tokens / window.num_pieces)

    def _add_cpu(self, path: str, table: str, before: str, window: Window, count: int) -> None:
        for role in ROLES:
            self.add(path, table, before + role, window.cpu_s[role] / count * 1e6)
        ours = window.cpu_s["gateway"] + window.cpu_s["front"]
        self.add(path, table, before + _PATH, ours / count * 1e6)

    def _add_others(self, path: str, window: Window) -> None:
        self.add(path, _OTHERS, "cores", window.cores(OTHERS_ROLE))
