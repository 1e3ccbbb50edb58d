"""How is a client answered whose connection is at an ASGI server, as behind Ray Serve's proxy?"""

import asyncio

from starlette.types import Message, Receive, Send

from serving.gateway.http.reply.client import ClientEvents
from serving.stream.frames import Headers


class AsgiClient:
    """The client of one request, as `send` and `receive` know it.

    It takes as much at a time as the server does: while that has not sent one message it is not
    ready for the next.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._messages: list[Message] = []
        self._is_sending = False
        self._has_more = asyncio.Event()
        self._is_over = False
        self._error: Exception | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the server has sent what it got."""
        return not self._messages and not self._is_sending

    def start(self, status: int, headers: Headers) -> None:
        """Begin the reply."""
        self._messages.append({"type": "http.response.start", "status": status, "headers": headers})

    def write(self, body: bytes, *, is_last: bool = False) -> None:
        """Send bytes of the body."""
        self._messages.append(
            {"type": "http.response.body", "body": body, "more_body": not is_last}
        )
        self._is_over = self._is_over or is_last
        self._has_more.set()

    def break_off(self, error: Exception) -> None:
        """End the application with `error`: the server logs it and closes the connection."""
        self._error = error
        self._has_more.set()

    async def serve(self, events: ClientEvents, receive: Receive) -> None:
        """Tell what the client sends, then send what it is answered. Raise what broke that off."""
        is_wanted = events.begin()
        while is_wanted:
            message = await receive()
            if message["type"] == "http.disconnect":
                events.on_left()
                return
            is_wanted = events.on_body(message.get("body", b""))
            if not message.get("more_body", False):
                break
        events.on_body_end()
        watch = asyncio.ensure_future(self._watch(events, receive))
        try:
            await self._send_all(events)
        finally:
            watch.cancel()
            events.on_left()

    async def _watch(self, events: ClientEvents, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._is_over = True
        self._has_more.set()
        events.on_left()

    async def _send_all(self, events: ClientEvents) -> None:
        while True:
            messages, self._messages = self._messages, []
            self._is_sending = True
            for message in messages:
                await self._send(message)
            self._is_sending = False
            if self._error is not None:
                raise self._error
            if self._messages:
                continue
            if self._is_over:
                return
            self._has_more.clear()
            events.on_ready()
            await self._has_more.wait()
