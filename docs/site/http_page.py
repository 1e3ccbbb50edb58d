"""Writes `docs/reference/http.md`: what a gateway answers, asked for it; and headers and errors."""

import ast
import asyncio
import inspect
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
from starlette.routing import Route

from router import RejectReason
from serving.config import parse
from serving.gateway.app import Gateway
from serving.gateway.http.endpoints.batch.endpoints import BatchEndpoints
from serving.gateway.http.errors import rejection_error
from serving.gateway.http.origins import _EXPOSED
from serving.gateway.intake.request_headers import FORWARDED
from serving.gateway.tenants.keys import KeysFile, make_key

GATEWAY = Path(__file__).resolve().parents[2] / "serving" / "gateway"

_ABOUT = """# HTTP

Written from the code by `make docs`; in words: [HTTP](../http.md). Endpoints that run a model are
vLLM's: [what becomes of each](../endpoints.md).

## Endpoints of ours

A gateway with keys was asked which key is needed: *admin* is one made with `--admin`, *any* is that
or a tenant's. Without `auth.keys_file` nothing needs a key.
"""
_ABOUT_ASKED = """
## Headers of requests

Beside these all that HTTP itself knows; what is not named here stays at the gateway.

| header | |
|---|---|
"""
_ABOUT_TOLD = """
## Headers of replies

| header | |
|---|---|
"""
_ABOUT_ERRORS = """
## Errors

As OpenAI has them, `{"error": {"message", "type", "param", "code"}}`; under `/v1/messages` as
Anthropic does. What vLLM refuses has vLLM's words. Where `code` is none of these it is the status.

| status | code | message |
|---|---|---|
"""
_ASKED = {
    "authorization": "`Bearer KEY`; `x-api-key: KEY` as Anthropic's clients have it",
    "x-headway-class": "`interactive`, `standard` or `batch`; goes before the field",
    "x-request-id": "the client's own id: in the reply, the log, traces and `headway explain`",
    "endpoint-load-metrics-format": "vLLM's: asks for its load in the reply",
    "traceparent": "the trace that it belongs to ([traces](../logs.md#traces))",
    "tracestate": "likewise",
    "x-data-parallel-rank": "vLLM's own",
    "x-session-id": "the same for requests of one conversation; the body's goes before it",
    "x-vllm-priority": "lower is first, among the tenant's own; goes before the body's `priority`",
}
_TOLD = {
    "x-request-id": "the client's, or one that was drawn for it",
    "retry-after": "seconds, with 429 and 503",
    "x-headway-cache": "`hit`, `miss`, `join` or `bypass` ([cache](../cache.md))",
    "x-headway-engine": "which engine answered (`gateway.reply_headers`)",
    "x-headway-held-ms": "for how long it was held before (likewise)",
    "x-headway-model": "which model a route has chosen",
    "x-headway-provider": "which provider answered ([providers](../providers.md))",
    "x-headway-why": "why a route has chosen that model",
    **{
        f"x-ratelimit-{what}-{of}": words.format(of)
        for what, words in (
            ("limit", "the tenant's limit of {}"),
            ("remaining", "{} that are left of it"),
            ("reset", "how long until all {} are there again"),
        )
        for of in ("requests", "tokens")
    },
}


def http_page() -> str:
    """Return the page, in Markdown. Raise `LookupError` for a header that is not described."""
    lines = [_ABOUT, "| path | method | key | |", "|---|---|---|---|"]
    lines += asyncio.run(_endpoints())
    asked = [
        "authorization",
        "x-headway-class",
        "x-request-id",
        *(each.decode() for each in FORWARDED),
    ]
    headers = _rows(asked, _ASKED), _rows(_EXPOSED, _TOLD)
    page = "\n".join(lines) + "\n" + _ABOUT_ASKED + headers[0] + _ABOUT_TOLD + headers[1]
    return (
        page
        + _ABOUT_ERRORS
        + "".join(
            f"| {status} | `{code}` | {words} |\n" for status, code, words in sorted(_errors())
        )
    )


def _rows(names: list[str] | tuple[str, ...], meanings: dict[str, str]) -> str:
    if missing := [name for name in names if name not in meanings]:
        raise LookupError(f"say in docs/site/http_page.py what {', '.join(missing)} mean")
    return "".join(f"| `{name}` | {meanings[name]} |\n" for name in names)


async def _endpoints() -> list[str]:
    """Return a row for each endpoint, of a gateway with keys."""
    logging.getLogger("serving").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "keys.json"
        with KeysFile(path) as file:
            text, key = make_key("tenant")
            file.keys.append(key)
            file.save()
        config = parse({"auth": {"keys_file": str(path)}, "batch": {"dir": folder}})
        gateway = Gateway(config, "docs")
        routes = [
            Route("/v1/models", gateway.get_models),
            Route("/v1/models/{name:path}", gateway.get_model),
            *BatchEndpoints(config, gateway.tenants, gateway.batches).routes(),
            *gateway._own_routes(alone=False),
        ]
        transport = httpx.ASGITransport(gateway.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            rows = [await _row(route, client, text) for route in routes]
        gateway.close()
    return sorted(rows)


async def _row(route: Route, client: httpx.AsyncClient, key: str) -> str:
    methods = sorted((route.methods or {"GET"}) - {"HEAD"})
    path = route.path
    for name in route.param_convertors:
        path = path.replace("{" + name + ":path}", "x").replace("{" + name + "}", "x")
    needs = "none"
    if (await client.request(methods[0], path)).status_code == 401:
        headers = {"authorization": f"Bearer {key}"}
        status = (await client.request(methods[0], path, headers=headers)).status_code
        needs = "admin" if status == 403 else "any"
    shown = route.path.replace(":path}", "}")
    about = (inspect.getdoc(route.endpoint) or "").partition("\n\n")[0].replace("\n", " ")
    return f"| `{shown}` | {', '.join(methods)} | {needs} | {about} |"


def _errors() -> Iterator[tuple[int, str, str]]:
    """Yield status, code and message of what is refused with a code of its own."""
    for reason in RejectReason:
        error = rejection_error(reason, None)
        if error.code != error.status:
            yield error.status, str(error.code), str(error)
    found = set()
    for path in sorted(GATEWAY.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            is_error = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ApiError"
            if is_error and (row := _error(node)) is not None:
                found.add(row)
    yield from found


def _error(call: ast.Call) -> tuple[int, str, str] | None:
    """Return the same of a call that makes an error; None if its code is not written there."""
    code = next((each.value for each in call.keywords if each.arg == "code"), None)
    status, message = call.args[:2]
    if not isinstance(code, ast.Constant) or not isinstance(status, ast.Constant):
        return None
    return status.value, code.value, _words(message)


def _words(message: ast.expr) -> str:
    """Return a message as it is written, with … for what is put into it."""
    if isinstance(message, ast.Constant):
        return str(message.value)
    if isinstance(message, ast.JoinedStr):
        return "".join(
            _words(each) if isinstance(each, ast.Constant) else "…" for each in message.values
        )
    return "…"
