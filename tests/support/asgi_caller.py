"""An ASGI client of one request, no server between."""

import asyncio
import json
from typing import Any

from starlette.types import ASGIApp


class Caller:
    """Sends one request to an application; `leave()` disconnects it."""

    def __init__(self, app: ASGIApp, body: Any, path: str) -> None:
        self.status = 0
        self.parts: list[bytes] = []
        self.complete = False
        self._app = app
        self._body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._path = path
        self._asked = False
        self._left = asyncio.Event()

    async def run(self) -> "Caller":
        await self._app({"type": "http", "path": self._path}, self._receive, self._send)
        return self

    def leave(self) -> None:
        self._left.set()

    @property
    def text(self) -> str:
        return b"".join(self.parts).decode()

    @property
    def body(self) -> Any:
        return json.loads(self.text)

    @property
    def events(self) -> list[Any]:
        data = [event.removeprefix("data: ") for event in self.text.split("\n\n") if event]
        assert data.pop() == "[DONE]"
        return [json.loads(each) for each in data]

    async def _receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.parts.append(message["body"])
            self.complete = not message["more_body"]
