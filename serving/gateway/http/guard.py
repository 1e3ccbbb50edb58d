"""When is an HTTP connection cut because its client is too slow or sends too much?

| the client                                              | the connection                  |
|---------------------------------------------------------|---------------------------------|
| sends no complete head within `head_timeout_s`          | closes                          |
| sends no complete body within `body_timeout_s`          | closes                          |
| sends a head of more than `max_head_bytes`              | is answered 431 and closes      |
| leaves a full buffer unread for `stall_timeout_s`       | is aborted                      |
"""

import asyncio
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"content-length: 0\r\nconnection: close\r\n\r\n"
)


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """How long a client may take, and how much it may send."""

    head_timeout_s: float  # from the connection, or a request's first byte, to its last header
    body_timeout_s: float  # from the last header to the last byte of the body
    stall_timeout_s: float  # without reading while the send buffer is full
    max_head_bytes: int


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with these limits; uvicorn itself limits only idle time between requests.

    There is at most one timer per direction, and sending a token touches none: a
    response that the client reads in time never fills the buffer.
    """

    def __init__(self, *args: Any, limits: ClientLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._is_in_head = True
        self._num_head_bytes = 0
        self._request_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._set_request_timeout(self._limits.head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._set_request_timeout(None)
        if self._stall_timer is not None:
            self._stall_timer.cancel()

    def data_received(self, data: bytes) -> None:
        if self._is_in_head:
            if self._request_timer is None:
                self._set_request_timeout(self._limits.head_timeout_s)
            self._num_head_bytes += len(data)
        super().data_received(data)
        if self._is_in_head and self._num_head_bytes > self._limits.max_head_bytes:
            self.transport.write(_TOO_LARGE)
            self.transport.close()

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._is_in_head, self._num_head_bytes = False, 0
        self._set_request_timeout(self._limits.body_timeout_s)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._is_in_head = True
        self._set_request_timeout(None)

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

    def _set_request_timeout(self, timeout_s: float | None) -> None:
        """Close the connection after `timeout_s` unless called again before; None: do not."""
        if self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None
        if timeout_s is not None:
            self._request_timer = self.loop.call_later(timeout_s, self.transport.close)
