"""How do engines without a model speak HTTP? The little of ASGI that they need."""

from collections.abc import Awaitable
from typing import Any

import msgspec
from starlette.types import Receive, Send

EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]


def error_content(message: str, code: int) -> dict[str, Any]:
    """Return the body of an error in OpenAI's format."""
    kind = "NotFoundError" if code == 404 else "BadRequestError"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def send_part(send: Send, body: bytes) -> Awaitable[None]:
    """Send a part of a response that has begun."""
    return send({"type": "http.response.body", "body": body, "more_body": True})


async def reply(
    send: Send, status: int, content: dict[str, Any] | bytes, kind: bytes = b"application/json"
) -> None:
    """Send a whole response; a dictionary goes as JSON."""
    body = content if isinstance(content, bytes) else msgspec.json.encode(content)
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_body(receive: Receive) -> bytes | None:
    """Return the whole body of a request, None if the client disconnected before its end."""
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)
