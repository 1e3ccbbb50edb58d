r"""How does HTTP/1.1 go to one server? Connections that are kept, each with one call at a time.

    connecting --> idle --call--> busy --whole--> idle
        \           | \             \--breaks off, or is cancelled--> closed
         \          |  \--closed by the server, or unused for long--> closed
          \--> failed

Replies are told in the call that brings their bytes: no task per request, none per token. A kept
connection that the server has closed meanwhile, before a byte of the reply, is no failure of the
call: it goes over a new one.
"""

import asyncio
import contextlib
import socket
import ssl
import urllib.parse
from collections.abc import Callable
from typing import Protocol

import httptools

from serving.config import ConfigError
from serving.config.providers import ExternalConfig
from serving.stream.frames import Headers

# vLLM's uvicorn closes a connection after 5 s without a request.
_MAX_IDLE_S = 4.0
_MAX_HEAD_BYTES = 2**16


class ReplyEvents(Protocol):
    """Who is told of a reply. Exactly one of the last two ends it, unless it is cancelled."""

    def on_head(self, status: int, headers: Headers) -> None: ...
    def on_body(self, data: bytes) -> None: ...
    def on_complete(self) -> None: ...
    def on_broken(self, why: str) -> None: ...


class Call:
    """One request under way."""

    def __init__(self, request: bytes, events: ReplyEvents) -> None:
        self.request = request
        self.events = events
        self.connection: _Connection | None = None  # None: it is being opened, or is over
        self.is_over = False

    def cancel(self) -> None:
        """Hang up. The server sees that and stops."""
        self.is_over = True
        if self.connection is not None:
            self.connection.abort()

    def pause(self) -> None:
        """Read no more of the reply for now."""
        if self.connection is not None:
            self.connection.pause()

    def go_on(self) -> None:
        """Read on."""
        if self.connection is not None:
            self.connection.go_on()


class HttpClient:
    """The connections to one server."""

    def __init__(
        self,
        config: ExternalConfig,
        on_received: Callable[[], None] = lambda: None,
        on_all_told: Callable[[], None] = lambda: None,
        *,
        key: str | None = None,
    ) -> None:
        """What comes in one piece is told of between `on_received` and `on_all_told`.

        Raise `ConfigError` if `ca_file` cannot be used.
        """
        parts = urllib.parse.urlsplit(config.url)
        self._host = parts.hostname or ""
        is_tls = parts.scheme == "https"
        self._port = parts.port or (443 if is_tls else 80)
        self._tls = _tls_context(config) if is_tls else None
        self._prefix = parts.path
        self._connect_timeout_s = config.connect_timeout_s
        lines = [f"host: {parts.netloc}", "accept: */*"]
        if key is not None:
            lines.append(f"authorization: Bearer {key}")
        self._head_end = "".join(f"{line}\r\n" for line in lines).encode("latin-1")
        self.on_received = on_received
        self.on_all_told = on_all_told
        self._idle: list[_Connection] = []
        self._all: set[_Connection] = set()
        self._opening: set[asyncio.Task[None]] = set()

    def send(
        self, method: str, path: str, headers: Headers, body: bytes, events: ReplyEvents
    ) -> Call:
        """Ask the server. `path` may have a query."""
        head = [f"{method} {self._prefix}{path} HTTP/1.1\r\n".encode("latin-1"), self._head_end]
        head += [name + b": " + value + b"\r\n" for name, value in headers]
        if body or method != "GET":
            head.append(b"content-length: %d\r\n" % len(body))
        call = Call(b"".join((*head, b"\r\n", body)), events)
        self.start(call)
        return call

    def start(self, call: Call) -> None:
        """Give a call to a connection that is kept, else to a new one."""
        now_s = asyncio.get_running_loop().time()
        while self._idle:
            connection = self._idle.pop()
            if now_s - connection.idle_s < _MAX_IDLE_S and connection.is_open:
                connection.begin(call, is_used=True)
                return
            connection.abort()
        self.start_anew(call)

    def start_anew(self, call: Call) -> None:
        """Open a connection for a call."""
        task = asyncio.get_running_loop().create_task(self._open(call))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, call: Call) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self), self._host, self._port, ssl=self._tls
                )
        except (OSError, TimeoutError) as error:
            if not call.is_over:
                call.is_over = True
                call.events.on_broken(_why(error, self._connect_timeout_s))
            return
        if call.is_over:
            connection.abort()
        else:
            connection.begin(call, is_used=False)

    def keep(self, connection: "_Connection") -> None:
        """Use a connection again."""
        self._idle.append(connection)

    def add(self, connection: "_Connection") -> None:
        self._all.add(connection)

    def forget(self, connection: "_Connection") -> None:
        self._all.discard(connection)
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)

    def close(self) -> None:
        """Drop all connections. Calls hear nothing more."""
        for task in self._opening:
            task.cancel()
        for connection in list(self._all):
            connection.drop()


class _Connection(asyncio.Protocol):
    """One connection, and the call that has it."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client
        self._transport: asyncio.Transport | None = None
        self._call: Call | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._headers: Headers = []
        self._is_used = False  # by a call before this one
        self._has_answered = False
        self._ends_with_connection = False
        self._num_head_bytes = 0
        self._keeps_alive = False
        self.idle_s = 0.0

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def begin(self, call: Call, *, is_used: bool) -> None:
        """Send the request of a call."""
        assert self._transport is not None
        self._call, call.connection = call, self
        self._parser = httptools.HttpResponseParser(self)
        self._is_used, self._has_answered, self._num_head_bytes = is_used, False, 0
        self._transport.write(call.request)

    def pause(self) -> None:
        if self._transport is not None:
            self._transport.pause_reading()

    def go_on(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()

    def abort(self) -> None:
        """Hang up; whoever has the call knows."""
        self._call = None
        if self._transport is not None:
            self._transport.abort()

    drop = abort

    # --- asyncio's ---------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._client.add(self)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        if self._call is None or self._parser is None:
            self.abort()  # nobody has asked
            return
        self._client.on_received()
        try:
            if not self._has_answered:
                self._num_head_bytes += len(data)
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._break_off(f"it does not speak HTTP ({type(error).__name__})")
        finally:
            self._client.on_all_told()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._client.forget(self)
        call = self._call
        if call is None:
            return
        self._client.on_received()
        try:
            if self._ends_with_connection and self._has_answered and exc is None:
                self._end()
            elif self._is_used and not self._has_answered:
                self._call, call.connection = None, None
                self._client.start_anew(call)
            else:
                self._break_off("the connection broke")
        finally:
            self._client.on_all_told()

    # --- the parser's --------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._headers = []
        self._ends_with_connection = True

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name in (b"content-length", b"transfer-encoding"):
            self._ends_with_connection = False
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        status = self._parser.get_status_code()
        if status < 200:
            return  # 100 Continue and alike: the reply is still to come
        self._has_answered = True
        self._keeps_alive = self._parser.should_keep_alive()
        if self._call is not None:
            self._call.events.on_head(status, self._headers)

    def on_body(self, data: bytes) -> None:
        if self._call is not None:
            self._call.events.on_body(data)

    def on_message_complete(self) -> None:
        if self._has_answered:
            self._end()

    def _end(self) -> None:
        """Tell that the reply is whole, and keep the connection for the next call."""
        call, self._call = self._call, None
        if self._transport is not None:
            if self._keeps_alive and not self._ends_with_connection:
                self._transport.resume_reading()
                self.idle_s = asyncio.get_running_loop().time()
                self._client.keep(self)
            else:
                self._transport.close()
        if call is not None:
            call.is_over, call.connection = True, None
            call.events.on_complete()

    def _break_off(self, why: str) -> None:
        call, self._call = self._call, None
        if self._transport is not None:
            self._transport.abort()
        if call is not None:
            call.is_over, call.connection = True, None
            call.events.on_broken(why)


class Answer:
    """A whole reply, for questions of our own."""

    def __init__(self, max_bytes: int = 2**24) -> None:
        self.status = 0
        self.body = b""
        self._parts = bytearray()
        self._max_bytes = max_bytes
        self._done: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def on_head(self, status: int, headers: Headers) -> None:
        self.status = status

    def on_body(self, data: bytes) -> None:
        if len(self._parts) < self._max_bytes:
            self._parts += data

    def on_complete(self) -> None:
        self.body = bytes(self._parts)
        if not self._done.done():
            self._done.set_result("")

    def on_broken(self, why: str) -> None:
        if not self._done.done():
            self._done.set_result(why)

    async def wait(self) -> None:
        """Return when it is whole. Raise `ConnectionError`, with the reason in words."""
        if why := await self._done:
            raise ConnectionError(why)


async def ask(client: HttpClient, path: str, timeout_s: float) -> Answer:
    """Return the whole reply to a GET. Raise `ConnectionError` or `TimeoutError`."""
    answer = Answer()
    call = client.send("GET", path, [], b"", answer)
    try:
        async with asyncio.timeout(timeout_s):
            await answer.wait()
    finally:
        if not call.is_over:
            call.cancel()
    return answer


def _tls_context(config: ExternalConfig) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(
            cafile=None if config.ca_file is None else str(config.ca_file)
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"external: ca_file {config.ca_file} cannot be used: {type(error).__name__}"
        ) from None


def _why(error: Exception, timeout_s: float) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message} (ca_file)"
    if isinstance(error, ssl.SSLError):
        return f"it does not speak TLS as we do ({error.reason}); is it https?"
    if isinstance(error, socket.gaierror):
        return "its name is not known"
    if isinstance(error, TimeoutError):
        return f"no connection within {timeout_s:g} s (connect_timeout_s)"
    return f"no connection ({type(error).__name__})"
