"""How is the service? `headway status`."""

from typing import Annotated

import msgspec
import typer
from rich.table import Table

from serving.cli.errors import errors_in_one_line
from serving.cli.running.rows import ENGINE_COLUMNS, engine_rows, make_console, summary
from serving.cli.running.service import DEFAULT_URL, ApiKey, RunningService, Url

_NOT_READY = 3


def status(
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    json: Annotated[
        bool, typer.Option("--json", help="All that is known, as /headway/state has it.")
    ] = False,
) -> None:
    """Show engines, queue and outcomes of a running service, all its gateways together.

    Exits with 3 if no engine takes requests, with 1 if nobody answers.
    """
    with errors_in_one_line():
        service = RunningService(url, api_key)
        state = service.state()
        if json:
            print(msgspec.json.encode(service.state_json()).decode())
        rows = engine_rows(state, {})
    if not json:
        console = make_console()
        table = Table.grid(padding=(0, 2))
        for name, value in summary(state):
            table.add_row(name, value)
        console.print(table)
        # Without what needs two looks.
        shown = [i for i, name in enumerate(ENGINE_COLUMNS) if name != "tokens/s"]
        engines = Table(*(ENGINE_COLUMNS[i] for i in shown), box=None, padding=(0, 2, 0, 0))
        for row in rows:
            engines.add_row(
                *(row.cells[i] for i in shown), style="" if row.is_ready else "bold red"
            )
        console.print()
        console.print(engines)
    if not any(row.is_ready for row in rows):
        raise typer.Exit(_NOT_READY)
