"""What may a client do on one HTTP connection, and when is it cut?

| the client                                              | the connection                  |
|---------------------------------------------------------|---------------------------------|
| sends no complete head within `head_timeout_s`          | closes                          |
| sends no complete body within `body_timeout_s`          | closes                          |
| sends a head or trailers of more than `max_head_bytes`  | is answered 431 and closes      |
| sends what is not HTTP                                  | is answered 400 and closes      |
| leaves a full buffer unread for `stall_timeout_s`       | is aborted                      |
| is one too many                                         | is answered 429 or 503, closes  |
| offers another protocol (`Upgrade`)                     | goes on as if it had not        |
| sends more while it is being answered                   | goes on; that waits its turn    |
"""

import asyncio
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httptools
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from serving.gateway.http.connections import Connections
from serving.gateway.http.errors import ApiError
from serving.gateway.http.own_headers import find_request_id
from serving.gateway.http.reply.client import ClientEvents
from serving.gateway.http.reply.own_client import OwnClient

logger = logging.getLogger(__name__)

# From a refusal that cannot wait for its client to the end of the connection. To close at once
# would discard what the client still sends, and TCP would take the refusal back.
_LINGER_S = 1.0
# Of a chunked body, framing included, per byte of it: "1\r\nx\r\n" is the least that a byte takes.
_MAX_FRAMING = 6
_VERSIONS = ("1.1", "1.0")
_OFFERS = (b"upgrade", b"http2-settings")


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

    While a response runs, bytes of the next request are kept unread, as many as a head may
    have; then TCP makes the client wait. (What came in the same piece as the end of a request is
    parsed with it; uvicorn keeps the requests in order.)
    """

    def __init__(
        self,
        *args: Any,
        limits: ClientLimits,
        counted: Connections,
        open_call: Callable[[Scope, OwnClient], ClientEvents | None] = lambda *_: None,
        **kwargs: Any,
    ) -> None:
        """`open_call` returns what answers a request; None if the ASGI application does."""
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._counted = counted
        self._open_call = open_call
        self._call: ClientEvents | None = None  # of the request that is being answered
        self._is_in_head = True
        self._num_head_bytes = 0  # read so far of a head that has begun
        self._num_message_bytes = 0  # read since the head, framing and trailers included
        self._num_body_bytes = 0  # of these, the body itself
        self._num_trailer_bytes = 0
        self._answering: RequestResponseCycle | None = None
        self._early = bytearray()  # of the next request, unread
        self._refusal: ApiError | None = None  # of what is no request: ends the connection
        # What the client may take only so long for: "head", or the body of this cycle.
        self._awaited: str | RequestResponseCycle | None = None
        self._request_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    # --- the connection -----------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if not self._counted.add(self, self.client):
            transport.abort()
        self._awaited = "head"
        self._set_request_timeout(self._limits.head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._counted.remove(self)
        self._leave_call()
        # uvicorn tells only the request that came last.
        for cycle in (self._answering, *(waiting for waiting, _ in self.pipeline)):
            if cycle is not None:
                _disconnect(cycle)
        super().connection_lost(exc)
        self._set_request_timeout(None)
        if self._stall_timer is not None:
            self._stall_timer.cancel()

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return  # where a request would begin in this, nobody knows
        if self._is_early:
            self._early += data
            if len(self._early) >= self._limits.max_head_bytes:
                self.flow.pause_reading()
        else:
            self._parse(data)

    @property
    def _is_early(self) -> bool:
        """Whether what comes now belongs to a request after the one that is being answered."""
        cycle = self._answering
        if cycle is None or cycle.response_complete:
            return False
        return cycle is not self.cycle or not cycle.more_body

    # --- parsing --------------------------------------------------------------

    def _parse(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._is_in_head:
            self._num_head_bytes += len(data)
        else:
            self._num_message_bytes += len(data)
        while data and self._refusal is None:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                data = self._head_without_offer() + data[offer.args[0] :]
                # The old one takes the connection for closed if the head said that it closes.
                self.parser = httptools.HttpRequestParser(self)
            except httptools.HttpParserError as error:
                self._on_parser_error(error)
            else:
                break
        if self._is_in_head:
            is_too_large = self._num_head_bytes > self._limits.max_head_bytes
        else:
            num_framing_bytes = self._num_message_bytes - _MAX_FRAMING * self._num_body_bytes
            num_bytes = max(num_framing_bytes, self._num_trailer_bytes)
            is_too_large = num_bytes > self._limits.max_head_bytes
        if is_too_large and self._refusal is None:
            self._refuse(self._too_large())
        self._limit_time()

    def _on_parser_error(self, error: httptools.HttpParserError) -> None:
        cause = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else None
        if cause is None or isinstance(cause, httptools.HttpParserError | UnicodeError):
            self._refuse(ApiError(400, f"This is not HTTP: {cause or error}", kind="Bad Request"))
        else:
            logger.error("a request's head cannot be read", exc_info=cause)
            self._refuse(ApiError(500, "Internal server error", kind="InternalServerError"))

    def _head_without_offer(self) -> bytes:
        """Return the head that was just parsed, without its offer of another protocol.

        httptools takes what follows an offer for the other protocol's, not for the body,
        whatever the server answers. So the parser gets the head a second time.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":  # an offer by itself
            self._refuse(ApiError(405, "This is no proxy.", kind="Method Not Allowed"))
            return b""
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (method, self.url, version)]
        for name, value in self.headers:
            if name == b"connection":
                options = [option.strip() for option in value.split(b",")]
                value = b", ".join(each for each in options if each.lower() not in _OFFERS)
            if name not in _OFFERS:
                lines.append(name + b": " + value)
        return b"\r\n".join([*lines, b"", b""])

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:
            super().on_header(name, value)
        else:  # a trailer, which nobody reads
            self._num_trailer_bytes += len(name) + len(value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade() or self._refusal is not None:
            return  # with an offer, the head comes again without it
        if (version := self.parser.get_http_version()) not in _VERSIONS:
            self._refuse(
                ApiError(505, f"HTTP/{version} is not spoken.", kind="HTTP Version Not Supported")
            )
            return
        num_bytes = len(self.url) + sum([len(n) + len(v) for n, v in self.headers])
        if num_bytes > self._limits.max_head_bytes:
            self._refuse(self._too_large())
            return
        if (refusal := self._counted.refusal(self)) is not None:
            self._refuse(refusal)
            return
        self._is_in_head, self._num_head_bytes = False, 0
        self._num_message_bytes = self._num_body_bytes = self._num_trailer_bytes = 0
        super().on_headers_complete()
        if self.cycle is not self._answering:
            # uvicorn stops reading now, which would hide that the client leaves.
            self.flow.resume_reading()

    def on_body(self, body: bytes) -> None:
        if self._refusal is not None:
            return
        self._num_body_bytes += len(body)
        if self._call is None or self.cycle is not self._answering:
            super().on_body(body)
        else:
            self._call.on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade() or self._refusal is not None:
            return
        super().on_message_complete()
        self._is_in_head = True
        self._num_message_bytes = self._num_body_bytes = self._num_trailer_bytes = 0
        if self._call is not None and self._answering is self.cycle:
            self._call.on_body_end()

    # --- answers ----------------------------------------------------------------

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:  # type: ignore[override]
        self._answering = cycle
        self._call = self._open_call(cycle.scope, OwnClient(cycle))  # type: ignore[arg-type]
        if self._call is not None:
            self._begin(cycle, self._call)
            return
        if cycle.scope["http_version"] == "1.0":
            app = functools.partial(_answer_without_chunks, app, cycle)
        super()._start_asgi_task(cycle, app)  # type: ignore[arg-type]

    def _begin(self, cycle: RequestResponseCycle, call: ClientEvents) -> None:
        """Have a request answered, of which the head is there and perhaps more."""
        if call.begin() and cycle.waiting_for_100_continue:
            cycle.waiting_for_100_continue = False
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if cycle.body:
            call.on_body(bytes(cycle.body))
            cycle.body = bytearray()
        self.flow.resume_reading()
        if not cycle.more_body:
            call.on_body_end()

    def _leave_call(self) -> None:
        """Let whoever answers know that the client of this request is gone."""
        if self._call is not None:
            self._call.on_left()
            self._call = None

    def on_response_complete(self) -> None:
        self._answering = self._call = None
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self._refusal is not None:
            if self._answering is None:
                self._end_with(self._refusal)
        elif self._early and not self._is_early:
            early, self._early = bytes(self._early), bytearray()
            self._parse(early)
        else:
            self._limit_time()

    def _too_large(self) -> ApiError:
        return ApiError(
            431,
            "The request's head is larger than gateway.max_head_bytes "
            f"({self._limits.max_head_bytes} bytes).",
            kind="Request Header Fields Too Large",
        )

    def _refuse(self, error: ApiError) -> None:
        """Answer with `error` after what came before it, then close the connection."""
        self._refusal = error
        self._early.clear()
        cycle = self.cycle
        if cycle is not None and cycle.more_body and not cycle.response_complete:
            # The rest of its body will never come.
            _disconnect(cycle)
            if cycle is not self._answering:
                self.pipeline.popleft()
            else:
                self._leave_call()
                if cycle.response_started:
                    self.transport.close()
                    return
                self._answering = None
        if self._answering is None:
            self._end_with(error)

    def _end_with(self, error: ApiError) -> None:
        """Send a reply without a request that it belongs to, then close the connection."""
        body = error.body()
        headers = [
            *error.headers(),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
            (b"x-request-id", find_request_id(self.headers or []).encode("latin-1")),
        ]
        head = b"".join(b"%b: %b\r\n" % header for header in headers)
        self.transport.write(b"%b%b\r\n%b" % (STATUS_LINE[error.status], head, body))
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self._set_request_timeout(_LINGER_S)
        else:
            self.transport.close()

    # --- timers -------------------------------------------------------------------

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
        if self._call is not None:
            self._call.on_ready()

    def _limit_time(self) -> None:
        """Have a timer for what the client has begun to send; none for what is all there."""
        awaited: str | RequestResponseCycle | None = None
        is_others_turn = self._answering is not None and self._answering is not self.cycle
        if self._refusal is not None:
            if self._answering is None:
                return  # the connection ends
        elif self._is_in_head:
            awaited = "head" if self._num_head_bytes else None
        elif not is_others_turn:
            awaited = self.cycle
        if awaited is self._awaited:
            return
        self._awaited = awaited
        if awaited is None:
            self._set_request_timeout(None)
        elif awaited == "head":
            self._set_request_timeout(self._limits.head_timeout_s)
        else:
            self._set_request_timeout(self._limits.body_timeout_s)

    def _set_request_timeout(self, timeout_s: float | None) -> None:
        """Close the connection after `timeout_s` unless called again before; None: do not."""
        if self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None
        if timeout_s is not None:
            self._request_timer = self.loop.call_later(timeout_s, self.transport.close)


def _disconnect(cycle: RequestResponseCycle) -> None:
    """Let the application see that the client of this request is gone."""
    if not cycle.response_complete:
        cycle.disconnected = True
        cycle.message_event.set()


async def _answer_without_chunks(
    app: ASGIApp, cycle: RequestResponseCycle, scope: Scope, receive: Receive, send: Send
) -> None:
    """Answer a client of HTTP/1.0, which knows no chunks.

    A reply whose length its head does not say ends with the connection.
    """

    is_sized = False

    async def send_plain(message: Message) -> None:
        nonlocal is_sized
        if message["type"] == "http.response.start":
            is_sized = any(name == b"content-length" for name, _ in message["headers"])
            if not is_sized:
                cycle.chunked_encoding = False
        elif not is_sized:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    await app(scope, receive, send_plain)
