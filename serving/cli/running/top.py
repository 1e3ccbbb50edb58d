"""What does the service do, live? `headway top`."""

import time
from typing import ClassVar

from textual import work
from textual.app import App, ComposeResult
from textual.binding import BindingType
from textual.widgets import DataTable, Footer, Static

from serving.cli.running.rows import ENGINE_COLUMNS, TokenRates, engine_rows, summary
from serving.cli.running.service import RunningService
from serving.gateway.http.endpoint import StartError
from serving.gateway.observe.state import ServiceState


class Top(App[None]):
    """A table of engines over what gateways say of themselves, asked every so often."""

    CSS = """
    #summary { height: auto; padding: 0 1 1 1; }
    #problem { height: auto; padding: 0 1; color: $error; display: none; }
    #engines { height: 1fr; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        ("q", "quit", "Quit"),
        ("space", "pause", "Pause"),
        ("plus,equals_sign", "pace(0.5)", "Faster"),
        ("minus", "pace(2)", "Slower"),
    ]

    def __init__(self, service: RunningService, every_s: float = 1.0) -> None:
        super().__init__()
        self.title = f"headway top – {service.url}"
        self._service = service
        self._every_s = every_s
        self._rates = TokenRates()
        self._is_paused = False
        self._next_s = 0.0

    def compose(self) -> ComposeResult:
        yield Static("", id="summary")
        yield Static("", id="problem")
        yield DataTable(id="engines", cursor_type="row", zebra_stripes=True)
        yield Footer()

    def on_mount(self) -> None:
        """Begin to ask."""
        self.query_one("#engines", DataTable).add_columns(*ENGINE_COLUMNS)
        self.set_interval(0.1, self._ask_if_due)

    def action_pause(self) -> None:
        """Ask no more, or again."""
        self._is_paused = not self._is_paused
        self.sub_title = "paused" if self._is_paused else ""

    def action_pace(self, factor: float) -> None:
        """Ask more or less often, between ten times a second and once a minute."""
        self._every_s = min(60.0, max(0.1, self._every_s * factor))

    def _ask_if_due(self) -> None:
        now_s = time.monotonic()
        if not self._is_paused and now_s >= self._next_s:
            self._next_s = now_s + self._every_s
            self._ask()

    @work(thread=True, exclusive=True, group="ask")
    def _ask(self) -> None:
        """Ask in a thread of its own: a slow answer must not freeze the keys."""
        try:
            state = self._service.state()
        except StartError as problem:
            self.call_from_thread(self._show_problem, str(problem))
        else:
            self.call_from_thread(self._show, state)

    def _show_problem(self, words: str) -> None:
        problem = self.query_one("#problem", Static)
        problem.update(words)
        problem.display = True

    def _show(self, state: ServiceState) -> None:
        self.query_one("#problem", Static).display = False
        width = max(len(name) for name, _ in summary(state))
        lines = (f"{name:{width}}  {value}" for name, value in summary(state))
        self.query_one("#summary", Static).update("\n".join(lines))
        table = self.query_one("#engines", DataTable)
        row_before = table.cursor_row
        table.clear()
        for row in engine_rows(state, self._rates.update(state, time.monotonic())):
            cells = row.cells if row.is_ready else tuple(f"[red]{each}[/]" for each in row.cells)
            table.add_row(*cells, key=row.name)
        if table.row_count:
            table.move_cursor(row=min(row_before, table.row_count - 1))


def run(url: str, api_key: str | None, every_s: float) -> None:
    """Show it until a key ends it. Raise `StartError` if nobody answers at first."""
    service = RunningService(url, api_key)
    service.state()
    Top(service, every_s).run()
