"""HTTP connections that are cut when the other side does not get on."""

import asyncio
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"content-length: 0\r\nconnection: close\r\n\r\n"
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a client is given; in seconds and bytes."""

    head_timeout_s: float  # from the connection, or the request's first byte, to its last header
    body_timeout_s: float  # from there to the last byte of its body
    stall_timeout_s: float  # without reading while a full buffer waits for it
    max_head_bytes: int


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which itself has a timeout for idle connections between requests only.

    One timer per connection at most, none of them touched per token: a
    response that the client reads in time never fills the buffer.
    """

    def __init__(self, *args: Any, limits: Limits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._is_in_head = True
        self._num_head_bytes = 0
        self._request_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_within(self._limits.head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._expect_within(None)
        if self._stall_timer is not None:
            self._stall_timer.cancel()

    def data_received(self, data: bytes) -> None:
        if self._is_in_head:
            if self._request_timer is None:
                self._expect_within(self._limits.head_timeout_s)
            self._num_head_bytes += len(data)
        super().data_received(data)
        if self._is_in_head and self._num_head_bytes > self._limits.max_head_bytes:
            self.transport.write(_TOO_LARGE)
            self.transport.close()

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._is_in_head, self._num_head_bytes = False, 0
        self._expect_within(self._limits.body_timeout_s)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._is_in_head = True
        self._expect_within(None)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(
                self._limits.stall_timeout_s, self.transport.abort
            )

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _expect_within(self, timeout_s: float | None) -> None:
        """Close unless told otherwise by then; None: nothing is expected."""
        if self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None
        if timeout_s is not None:
            self._request_timer = self.loop.call_later(timeout_s, self.transport.close)
