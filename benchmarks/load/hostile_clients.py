"""Connections that hold what they can and give nothing for it."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

_HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
_NUM_AT_ONCE = 200  # connections being opened; a listen queue is not endless


class _Silent(asyncio.Protocol):
    """Says what it was made to say, and waits to be cut."""

    def __init__(self, crowd: "Crowd", kind: str, words: bytes) -> None:
        self._crowd = crowd
        self._kind = kind
        self._words = words
        self._since_s = time.perf_counter()
        self._head = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._crowd.open[self._kind] += 1
        self._crowd.transports.add(self._transport)
        if self._words:
            self._transport.write(self._words)

    def data_received(self, data: bytes) -> None:
        if len(self._head) < 12:
            self._head += data

    def connection_lost(self, exc: Exception | None) -> None:
        crowd = self._crowd
        crowd.transports.discard(self._transport)
        crowd.open[self._kind] -= 1
        if not crowd.is_leaving:
            crowd.cut[self._kind] += 1
            crowd.cut_after_s[self._kind] = max(
                crowd.cut_after_s.get(self._kind, 0.0), time.perf_counter() - self._since_s
            )
            if self._head.startswith(b"HTTP/1.1 "):
                crowd.answers[self._kind, int(self._head[9:12])] += 1


@dataclass
class Crowd:
    """All of them, by kind."""

    host: str
    port: int
    open: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)  # by the server
    cut_after_s: dict[str, float] = field(default_factory=dict)  # the longest
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)  # kind and status
    not_connected: Counter[str] = field(default_factory=Counter)
    transports: set[asyncio.Transport] = field(default_factory=set)
    is_leaving: bool = False

    async def idle(self, number: int) -> None:
        """Connect and say nothing."""
        await self._connect("idle", number, lambda: b"")

    async def half_sent(self, number: int, num_bytes: int) -> None:
        """Send so much of a body that is announced to be twice as large."""
        head = _HEAD + b"content-length: %d\r\n\r\n" % (2 * num_bytes)
        await self._connect("half-sent body", number, lambda: head + b" " * num_bytes)

    async def header_bombs(self, number: int, num_bytes: int) -> None:
        """Send a head that does not end."""
        line = b"x: " + b"y" * 1000 + b"\r\n"
        await self._connect(
            "header bomb", number, lambda: _HEAD + line * (num_bytes // len(line) + 1)
        )

    async def _connect(self, kind: str, number: int, words: Callable[[], bytes]) -> None:
        loop = asyncio.get_running_loop()
        gate = asyncio.Semaphore(_NUM_AT_ONCE)

        async def one() -> None:
            async with gate:
                try:
                    await loop.create_connection(
                        lambda: _Silent(self, kind, words()), self.host, self.port
                    )
                except OSError:
                    self.not_connected[kind] += 1

        await asyncio.gather(*(one() for _ in range(number)))

    async def until_cut(self, timeout_s: float) -> None:
        """Return when the server has cut all of them, or after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.transports:
                    await asyncio.sleep(0.2)

    def leave(self) -> None:
        """Close what is left."""
        self.is_leaving = True
        for transport in list(self.transports):
            transport.abort()
