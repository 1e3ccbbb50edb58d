"""How to load an OpenAI endpoint at little cost per token?

The client shares its cores with what it measures, so a token costs it one parser callback: raw
asyncio protocols, httptools for HTTP, events counted by their blank lines, and JSON parsed only
once, at the end of a response.

Times are seconds of `time.perf_counter`; an event loop's own clock is cached and too coarse.
"""

import asyncio
import itertools
import json
import re
import ssl
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

import httptools

# Kept of a response's end: usage, `[DONE]` and errors are in the last few pieces however a proxy
# cuts them.
_NUM_KEPT_PIECES = 8
_USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')
_ERROR_EVENT = re.compile(rb'data: ?(\{"error".*)')


@dataclass(slots=True, frozen=True)
class ApiRequest:
    """One request to send."""

    path: str
    body: bytes
    stream: bool

    @classmethod
    def chat(
        cls, model: str, prompt: str, num_tokens: int, stream: bool, **extra: Any
    ) -> "ApiRequest":
        """Return a chat request for exactly `num_tokens` tokens; `extra` goes into the body."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": num_tokens,
            "ignore_eos": True,
            "stream": stream,
            **extra,
        }
        return cls("/v1/chat/completions", json.dumps(body).encode(), stream)


@dataclass(slots=True)
class Record:
    """What became of one request; 0 for times that never came."""

    due_s: float  # when it was to be sent
    sent_s: float = 0.0  # when it was written, on an open connection
    first_s: float = 0.0  # first byte of the response body
    last_s: float = 0.0  # last byte so far
    num_events: int = 0  # server-sent events, `[DONE]` left out
    num_output_tokens: int | None = None  # from the response's usage, where it has one
    status: int = 0
    retry_after_s: float | None = None  # of the response's header
    completed: bool = False  # 200, whole, without an error event, and `[DONE]` where it streams
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """Seconds from sending to the first body byte."""
        return self.first_s - self.sent_s

    @property
    def late_s(self) -> float:
        """Seconds that it was sent late, by a slow generator or a slow connect."""
        return max(0.0, self.sent_s - self.due_s)


class _Connection(asyncio.Protocol):
    """A keep-alive connection with one request at a time."""

    def __init__(self, client: "Client", target: "_Target") -> None:
        self._client = client
        self._target = target
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._on_end: Callable[[Record], None] | None = None
        self._half_blank = False  # a blank line was cut between two pieces
        self._pieces: deque[bytes] = deque(maxlen=_NUM_KEPT_PIECES)
        self.record: Record | None = None
        self.stream = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def send(
        self, request: ApiRequest, record: Record, on_end: Callable[[Record], None] | None
    ) -> None:
        assert self._transport is not None, "this connection is closed"
        self.record, self.stream, self._on_end = record, request.stream, on_end
        self._half_blank = False
        self._pieces.clear()
        record.sent_s = time.perf_counter()
        head = (
            f"POST {request.path} HTTP/1.1\r\nHost: {self._target.host}:{self._target.port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(request.body)}\r\n"
            f"{self._client.headers}\r\n"
        )
        assert self._transport is not None  # only an open connection is idle
        self._transport.write(head.encode() + request.body)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.abort(f"not HTTP: {error}")

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after" and self.record is not None:
            self.record.retry_after_s = float(value)

    def on_body(self, body: bytes) -> None:
        record = self.record
        if record is None:
            return
        now_s = time.perf_counter()
        if not record.first_s:
            record.first_s = now_s
        record.last_s = now_s
        self._pieces.append(body)
        if self.stream:
            num_events = body.count(b"\n\n")
            if self._half_blank and body[0] == 10:
                num_events += 1
            self._half_blank = not body.endswith(b"\n\n") and body.endswith(b"\n")
            record.num_events += num_events
            self._client.num_events += num_events
            self._client.num_pieces += 1

    def on_message_complete(self) -> None:
        record = self.record
        if record is None:
            return
        record.status = self._parser.get_status_code()
        end = b"".join(self._pieces)
        if usage := _USAGE.findall(end):
            record.num_output_tokens = int(usage[-1])
        if record.status != 200:
            record.error = f"HTTP {record.status}: {end[:200].decode(errors='replace')}"
        elif self.stream and (error := _ERROR_EVENT.search(end)):
            record.error = f"error event: {error[1][:200].decode(errors='replace')}"
        elif self.stream and not end.rstrip().endswith(b"data: [DONE]"):
            record.error = "the stream ended without [DONE]"
        else:
            record.completed = True
        if record.completed and self.stream:
            record.num_events -= 1
            self._client.num_events -= 1
        keeps_alive = self._parser.should_keep_alive()
        if keeps_alive:
            self._target.idle.append(self)
        self._finish(record)
        if not keeps_alive and self._transport is not None:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._client.connections.discard(self)
        if self in self._target.idle:
            self._target.idle.remove(self)
        if self.record is not None:
            self.record.error = f"connection lost{f': {exc}' if exc else ''}"
            self._finish(self.record)

    def abort(self, reason: str) -> None:
        """Close at once, as a killed client does. Its request ends with `reason`."""
        if self.record is not None:
            self.record.error = reason
            self._finish(self.record)
        if self._transport is not None:
            self._transport.abort()

    def _finish(self, record: Record) -> None:
        self.record = None
        on_end, self._on_end = self._on_end, None
        self._client.count_end()
        if on_end is not None:
            on_end(record)


@dataclass(slots=True)
class _Target:
    host: str
    port: int
    tls: ssl.SSLContext | None
    idle: list[_Connection]


class Client:
    """Sends requests over a pool of connections to one or several servers, in rotation."""

    def __init__(self, urls: Sequence[str], headers: dict[str, str] | None = None) -> None:
        self.headers = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        self.connections: set[_Connection] = set()
        self.num_events = 0  # of all requests so far
        self.num_pieces = 0  # HTTP chunks that held them: fewer where a path merges events
        self.num_ended = 0
        self._targets = [
            _Target(
                parts.hostname or "127.0.0.1",
                parts.port or (443 if parts.scheme == "https" else 80),
                ssl.create_default_context() if parts.scheme == "https" else None,
                [],
            )
            for parts in map(urlsplit, urls)
        ]
        self._rotation = itertools.cycle(self._targets)
        self._opening: set[asyncio.Task[None]] = set()
        self.num_active = 0  # sent or connecting, and not ended
        self._all_ended = asyncio.Event()

    async def connect(self, num_connections: int) -> None:
        """Open connections in advance, so that connecting is not measured."""
        for target in itertools.islice(self._rotation, num_connections):
            target.idle.append(await self._open(target))

    def send(self, request: ApiRequest, on_end: Callable[[Record], None] | None = None) -> Record:
        """Send now; return the record, which fills until `on_end(record)` is called."""
        record = Record(due_s=time.perf_counter())
        self.num_active += 1
        self._all_ended.clear()
        target = next(self._rotation)
        if target.idle:
            target.idle.pop().send(request, record, on_end)
        else:
            task = asyncio.get_running_loop().create_task(
                self._open_and_send(target, request, record, on_end)
            )
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)
        return record

    async def wait(self, timeout_s: float) -> None:
        """Return when every request has ended; after `timeout_s`, abort the others."""
        if not self.num_active:
            return
        try:
            await asyncio.wait_for(self._all_ended.wait(), timeout_s)
        except TimeoutError:
            self.vanish(f"not ended after {timeout_s:g} s")

    def vanish(self, reason: str = "vanished") -> int:
        """Abort every connection at once, as a killed client does. Return how many."""
        for task in self._opening:
            task.cancel(reason)
        connections = list(self.connections)
        for connection in connections:
            connection.abort(reason)
        return len(connections)

    async def close(self) -> None:
        """Close every connection; requests that have not ended end as vanished."""
        self.vanish()
        await asyncio.gather(*self._opening, return_exceptions=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    def count_end(self) -> None:
        """Count a request that has ended, however it ended."""
        self.num_active -= 1
        self.num_ended += 1
        if not self.num_active:
            self._all_ended.set()

    async def _open(self, target: _Target) -> _Connection:
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: _Connection(self, target), target.host, target.port, ssl=target.tls
        )
        self.connections.add(connection)
        return connection

    async def _open_and_send(
        self,
        target: _Target,
        request: ApiRequest,
        record: Record,
        on_end: Callable[[Record], None] | None,
    ) -> None:
        try:
            connection = await self._open(target)
        except (OSError, asyncio.CancelledError) as error:
            record.error = f"cannot connect: {error}"
            self.count_end()
            if on_end is not None:
                on_end(record)
            if isinstance(error, asyncio.CancelledError):
                raise
        else:
            connection.send(request, record, on_end)
