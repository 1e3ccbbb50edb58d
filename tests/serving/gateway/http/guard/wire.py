"""One connection without a socket: what the client sends goes in, what it would see comes out."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import uvicorn
from uvicorn.server import ServerState

from serving.gateway.http.connections import Connections
from serving.gateway.http.guard import ClientLimits, GuardedProtocol
from tests.serving.gateway.http.raw_client import RawReply

LIMITS = ClientLimits(
    head_timeout_s=3.0, body_timeout_s=5.0, stall_timeout_s=7.0, max_head_bytes=1000
)
KEEP_ALIVE_S = 75.0


class Timer:
    """A timer that nobody waits for."""

    def __init__(self, delay_s: float, callback: Callable[[], None]) -> None:
        self.delay_s, self.callback, self.is_set = delay_s, callback, True

    def cancel(self) -> None:
        self.is_set = False

    def fire(self) -> None:
        assert self.is_set
        self.is_set = False
        self.callback()


class Transport:
    """The server's end of the connection."""

    def __init__(self, *, can_write_eof: bool = True) -> None:
        self.written = bytearray()
        self.is_reading = True
        self.ended: str = ""  # "eof", "close", "abort"
        self._can_write_eof = can_write_eof

    def get_extra_info(self, name: str) -> Any:
        return {"peername": ("192.0.2.1", 1234), "sockname": ("192.0.2.9", 80)}.get(name)

    def write(self, data: bytes) -> None:
        self.written += data

    def can_write_eof(self) -> bool:
        return self._can_write_eof

    def write_eof(self) -> None:
        self.ended = "eof"

    def close(self) -> None:
        self.ended = "close"

    def abort(self) -> None:
        self.ended = "abort"

    def is_closing(self) -> bool:
        return self.ended in ("close", "abort")

    def pause_reading(self) -> None:
        self.is_reading = False

    def resume_reading(self) -> None:
        self.is_reading = True


class Asked:
    """One request as the application has it, which answers it when the test says so."""

    def __init__(self, scope: dict, receive: Callable, send: Callable) -> None:
        self.scope, self.receive, self._send = scope, receive, send
        self.is_over = asyncio.Event()

    async def read(self) -> bytes | None:
        """The body; None if the client has left before its end."""
        body = b""
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if not message.get("more_body"):
                return body

    async def start(self, *headers: tuple[bytes, bytes]) -> None:
        await self._send({"type": "http.response.start", "status": 200, "headers": list(headers)})

    async def write(self, body: bytes, *, more_body: bool) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more_body})

    async def answer(self, body: bytes = b"ok", *, is_sized: bool = True) -> None:
        await self.start(*([(b"content-length", b"%d" % len(body))] if is_sized else []))
        await self.write(body, more_body=False)
        self.is_over.set()
        await settle()


class Wire:
    """A connection that is up."""

    made: ClassVar[list[Self]] = []  # in one test

    def __init__(
        self,
        limits: ClientLimits = LIMITS,
        *,
        can_write_eof: bool = True,
        max_connections: int = 9,
        max_per_client: int | None = None,
        open_call: Callable = lambda *_: None,
    ) -> None:
        self.asked: list[Asked] = []
        self.timers: list[Timer] = []
        self.counted = Connections(max_connections, max_per_client)
        self.transport = Transport(can_write_eof=can_write_eof)
        config = uvicorn.Config(
            self._app,
            ws="none",
            lifespan="off",
            interface="asgi3",
            access_log=False,
            log_config=None,
            server_header=False,
            date_header=False,
            timeout_keep_alive=int(KEEP_ALIVE_S),
        )
        loop = SimpleNamespace(
            create_task=asyncio.get_running_loop().create_task, call_later=self._call_later
        )
        self.protocol = GuardedProtocol(  # as uvicorn does
            config=config,
            server_state=ServerState(),
            app_state={},
            _loop=loop,
            limits=limits,
            counted=self.counted,
            open_call=open_call,
        )
        self.protocol.connection_made(self.transport)
        self.made.append(self)

    async def end(self) -> None:
        """Let the client leave, and the application end what it has begun."""
        if self.protocol.parser is not None:
            self.protocol.connection_lost(ConnectionResetError())
        for asked in self.asked:
            asked.is_over.set()
        await settle()

    async def _app(self, scope: dict, receive: Callable, send: Callable) -> None:
        asked = Asked(scope, receive, send)
        self.asked.append(asked)
        await asked.is_over.wait()

    def _call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        self.timers.append(Timer(delay_s, callback))
        return self.timers[-1]

    @property
    def waits_s(self) -> list[float]:
        """Of the timers that are set, how long they run."""
        return [timer.delay_s for timer in self.timers if timer.is_set]

    def fire(self, delay_s: float) -> None:
        """Let the timer that runs for so long run out."""
        [timer] = [each for each in self.timers if each.is_set and each.delay_s == delay_s]
        timer.fire()

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.protocol.data_received(piece)
            await settle()

    def take(self) -> bytes:
        """What has been written since the last time."""
        written = bytes(self.transport.written)
        self.transport.written.clear()
        return written

    def take_reply(self) -> RawReply:
        reply = RawReply()
        reply.feed(self.take())
        assert reply.is_complete
        return reply


async def settle() -> None:
    """Let every task go on until it waits for something."""
    for _ in range(8):
        await asyncio.sleep(0)


def head(*headers: str, path: str = "/x", method: str = "POST", version: str = "1.1") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/{version}", *headers, "", ""]).encode()


def request(body: bytes = b"{}", **fields: Any) -> bytes:
    return head(f"content-length: {len(body)}", **fields) + body
