"""Which figures does the overhead benchmark report, in which tables, against which targets?"""

from collections import defaultdict

from benchmarks.overhead.phases import LOAD_ROLE, OTHERS_ROLE, Window
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
_TOKEN_CPU = "CPU µs per token at 20,000 tokens/s, net of idle"
_SHORT = "Short requests (1 to 4 tokens)"
_OPEN_STREAMS = "1,000 open streams"
_OTHERS = "Cores taken by strangers meanwhile"


class Figures:
    """All figures of all paths, one value per repeat. Tables and rows keep their order."""

    def __init__(self) -> None:
        self._tables: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(
            lambda: defaultdict(lambda: defaultdict(list))
        )

    def add(self, path: str, table: str, row: str, value: float) -> None:
        self._tables[table][row][path].append(value)

    def get(self, path: str, table: str, row: str) -> Spread | None:
        values = self._tables[table][row].get(path)
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

    def add_busy(self, path: str, window: Window, p50_ms: float, p99_ms: float) -> None:
        """Add the figures of 200 streams at 20,000 tokens/s."""
        self.add(path, _TTFT, "p50 at 20,000 tokens/s", p50_ms)
        self.add(path, _TTFT, "p99 at 20,000 tokens/s", p99_ms)
        self.add_rate(path, "asked for 20,000", window)
        self._add_cpu(path, _TOKEN_CPU, "", window, window.num_tokens)

    def add_rate(self, path: str, what: str, window: Window) -> None:
        self.add(path, _RATES, what, window.tokens_per_s)
        self.add(path, _RATES, f"{what}: per HTTP chunk", window.num_tokens / window.num_pieces)
        self._add_others(path, window)

    def add_short(self, path: str, kind: str, window: Window) -> None:
        self.add(path, _SHORT, f"{kind}, per second", window.requests_per_s)
        self._add_cpu(path, _SHORT, f"{kind}, CPU µs: ", window, window.num_requests)
        self._add_others(path, window)

    def fill(self, report: Report) -> None:
        """Add the tables to the report, and what impairs them."""
        columns = {FLOOR: None}  # first, whichever phase came first
        for rows in self._tables.values():
            for paths in rows.values():
                columns.update(dict.fromkeys(paths))
        for table, rows in self._tables.items():
            for row in rows:
                spreads = {path: self.get(path, table, row) for path in columns}
                report.add_row(table, figure=row, **spreads)
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
        for name, table, row, target in (
            ("tokens/s flat out", _RATES, "flat out", ">= 50000"),
            ("CPU µs per token, gateway + front", _TOKEN_CPU, _PATH, "<= 40"),
            ("tokens/s in that test, 20,000 asked for", _RATES, "asked for 20,000", ">= 19000"),
            ("added TTFT p50, ms", _TTFT, "p50 added to the floor's", "<= 2"),
            ("added TTFT p99, ms", _TTFT, "p99 added to the floor's", "<= 5"),
            ("short requests/s, whole replies", _SHORT, "whole, per second", ">= 2000"),
            ("short requests/s, streamed replies", _SHORT, "streamed, per second", ">= 2000"),
        ):
            report.add_target(name, self.get(path, table, row), target)
        for row, target in (
            ("gateway MB added", "<= 200"),
            ("gateway MB with them", "<= 200"),
            ("left in the engines 1 s after all vanished", "<= 0"),
        ):
            spread = self.get(path, _OPEN_STREAMS, row)
            worst = max(spread.values) if spread is not None else None
            report.add_target(f"1,000 open streams, {row}, worst", worst, target)

    def _add_cpu(self, path: str, table: str, before: str, window: Window, count: int) -> None:
        for role in ROLES:
            self.add(path, table, before + role, window.cpu_s[role] / count * 1e6)
        ours = window.cpu_s["gateway"] + window.cpu_s["front"]
        self.add(path, table, before + _PATH, ours / count * 1e6)

    def _add_others(self, path: str, window: Window) -> None:
        self.add(path, _OTHERS, "cores", window.cores(OTHERS_ROLE))
