"""Which engine gets no new work? `headway drain` and `headway undrain`."""

import time
from typing import Annotated
from urllib.parse import quote

import typer

from serving.cli.errors import errors_in_one_line
from serving.cli.running.service import DEFAULT_URL, ApiKey, RunningService, Url
from serving.gateway.http.endpoint import StartError

_POLL_S = 0.25

Engine = Annotated[str, typer.Argument(help="Its id, as `headway status` shows it.")]


def drain(
    engine: Engine,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Return when it has nothing left to do.")
    ] = False,
) -> None:
    """Send an engine no new work, on any gateway; what it has goes on.

    Exits with 1 if a gateway could not be told: it hears of it as soon as it answers again.
    """
    with errors_in_one_line():
        service = RunningService(url, api_key)
        code = _order(service, engine, "drain")
        if wait:
            _wait_until_empty(service, engine)
    raise typer.Exit(code)


def undrain(engine: Engine, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Send an engine work again.

    Exits with 1 if a gateway could not be told: it hears of it as soon as it answers again.
    """
    with errors_in_one_line():
        code = _order(RunningService(url, api_key), engine, "undrain")
    raise typer.Exit(code)


def _order(service: RunningService, engine: str, what: str) -> int:
    """Give the order, say who has heard of it, return the exit code. Raise `StartError`."""
    reply = service.ask(f"/headway/engines/{quote(engine, safe='/:')}/{what}", method="POST")
    gateways = reply.get("gateways", {})
    deaf = {name: each["error"] for name, each in gateways.items() if "error" in each}
    says = "gets no new work" if reply["drains"] else "gets work again"
    among = f" from {len(gateways) - len(deaf)} of {len(gateways)} gateways" if gateways else ""
    typer.echo(f"{engine} {says}{among}")
    for name, reason in deaf.items():
        typer.echo(f"gateway {name}: {reason}", err=True)
    return 1 if deaf else 0


def _wait_until_empty(service: RunningService, engine: str) -> None:
    """Return when an engine has no request left. Raise `StartError` if it is taken back."""
    while True:
        state = service.state()
        if (replica := state.replicas.get(engine)) is None:
            typer.echo(f"{engine} is gone")
            return
        if engine not in state.drained:
            raise StartError(f"somebody has taken {engine} back")
        snapshot = replica.snapshot
        if not replica.ledger.num_open and not (snapshot and snapshot.num_inflight_reqs):
            typer.echo(f"{engine} has nothing left to do")
            return
        time.sleep(_POLL_S)
