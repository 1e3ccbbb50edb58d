"""What do clients send that only want to hold resources?

Connections that say nothing, bodies that stop half way and heads that never end.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

_HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
_NUM_AT_ONCE = 200  # connections being opened: a listen queue is not endless


class _HostileConnection(asyncio.Protocol):
    """Sends its bytes, then waits until the server closes the connection."""

    def __init__(self, clients: "HostileClients", kind: str, sent: bytes) -> None:
        self._clients = clients
        self._kind = kind
        self._sent = sent
        self._since_s = time.perf_counter()
        self._head = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._clients.connected[self._kind] += 1
        self._clients.transports.add(self._transport)
        if self._sent:
            self._transport.write(self._sent)

    def data_received(self, data: bytes) -> None:
        if len(self._head) < 12:
            self._head += data

    def connection_lost(self, exc: Exception | None) -> None:
        clients = self._clients
        clients.transports.discard(self._transport)
        clients.connected[self._kind] -= 1
        if not clients.is_closing:
            clients.cut[self._kind] += 1
            clients.cut_after_s[self._kind] = max(
                clients.cut_after_s.get(self._kind, 0.0), time.perf_counter() - self._since_s
            )
            if self._head.startswith(b"HTTP/1.1 "):
                clients.answers[self._kind, int(self._head[9:12])] += 1


@dataclass
class HostileClients:
    """All hostile connections to one server, counted by kind."""

    host: str
    port: int
    connected: Counter[str] = field(default_factory=Counter)  # now
    cut: Counter[str] = field(default_factory=Counter)  # closed by the server
    cut_after_s: dict[str, float] = field(default_factory=dict)  # the longest time until then
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)  # by kind and status
    not_connected: Counter[str] = field(default_factory=Counter)
    transports: set[asyncio.Transport] = field(default_factory=set)
    is_closing: bool = False

    async def connect_idle(self, number: int) -> None:
        """Open connections that send nothing."""
        await self._connect("idle", number, lambda: b"")

    async def send_half_bodies(self, number: int, num_bytes: int) -> None:
        """Send `num_bytes` each of a body that is announced to be twice as large."""
        head = _HEAD + b"content-length: %d\r\n\r\n" % (2 * num_bytes)
        await self._connect("half-sent body", number, lambda: head + b" " * num_bytes)

    async def send_header_bombs(self, number: int, num_bytes: int) -> None:
        """Send `num_bytes` each of a head that does not end."""
        line = b"x: " + b"y" * 1000 + b"\r\n"
        await self._connect(
            "header bomb", number, lambda: _HEAD + line * (num_bytes // len(line) + 1)
        )

    async def wait_until_cut(self, timeout_s: float) -> None:
        """Return when the server has closed all connections, or after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.transports:
                    await asyncio.sleep(0.2)

    def close_connections(self) -> None:
        """Close the connections that are still open."""
        self.is_closing = True
        for transport in list(self.transports):
            transport.abort()

    async def _connect(self, kind: str, number: int, make_bytes: Callable[[], bytes]) -> None:
        loop = asyncio.get_running_loop()
        gate = asyncio.Semaphore(_NUM_AT_ONCE)

        async def connect_one() -> None:
            async with gate:
                try:
                    await loop.create_connection(
                        lambda: _HostileConnection(self, kind, make_bytes()), self.host, self.port
                    )
                except OSError:
                    self.not_connected[kind] += 1

        await asyncio.gather(*(connect_one() for _ in range(number)))
