"""Why did this request wait, and where did it go? `headway explain`."""

import msgspec
from rich.table import Column, Table

from serving.cli.running.rows import make_console
from serving.cli.running.service import RunningService
from serving.gateway.observe.recent import Event, RequestWay

_WORDS = {
    "arrived": "arrived",
    "chosen": "model",
    "held": "held",
    "sent": "sent to",
    "first_token": "first token",
    "over": "over",
}


def run(service: RunningService, request_id: str | None, *, as_json: bool) -> None:
    """Print the way of a request, or the last requests. Raise `StartError` if nobody tells."""
    if request_id is None:
        _list(msgspec.convert(service.ask("/headway/requests"), list[RequestWay]))
        return
    found = service.request(request_id)
    if as_json:
        print(msgspec.json.encode(found).decode())
    else:
        _show(msgspec.convert(found, RequestWay))


def _list(ways: list[RequestWay]) -> None:
    console = make_console()
    request = Column(
        "request", no_wrap=True, min_width=max((len(way.id) for way in ways), default=0)
    )
    table = Table(request, "arrived", "model", "tokens", "ended", box=None, padding=(0, 2, 0, 0))
    for way in ways:
        table.add_row(
            way.id,
            way.arrived.astimezone().strftime("%H:%M:%S"),
            way.model,
            _tokens(way),
            way.outcome or way.events[-1].what,
        )
    console.print(table)


def _show(way: RequestWay) -> None:
    console = make_console()
    tenant = f" of {way.tenant}" if way.tenant else ""
    arrived = way.arrived.astimezone().isoformat(" ", "milliseconds")
    gateway = f", gateway {way.gateway}" if way.gateway else ""
    console.print(
        f"{way.request_class} request{tenant} for {way.model}, {_tokens(way)}, {arrived}{gateway}"
    )
    table = Table.grid(padding=(0, 2))
    for event in way.events:
        what = _WORDS.get(event.what, event.what)
        if event.what == "over":
            what = f"{way.outcome or 'over'}, {way.status or 'no reply'}"
        table.add_row(f"{event.after_s:9.3f} s", what, _details(event))
    if not way.is_over:
        table.add_row("", "still open", "")
    console.print(table)


def _details(event: Event) -> str:
    predicted = ""
    if event.predicted_ttft_s is not None:
        predicted = f"first token predicted {event.predicted_ttft_s:.3f} s later"
    return ", ".join(filter(None, (event.where, event.why, predicted)))


def _tokens(way: RequestWay) -> str:
    output = "" if way.num_output_tokens is None else f" + {way.num_output_tokens:,}"
    return f"{way.num_prompt_tokens:,}{output} tokens"
