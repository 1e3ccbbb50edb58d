"""One client's request, the engines that try it, and the response on its way to the client."""

import asyncio
import time

from router import RejectReason, Request, Usage
from router.resilience.resume import Records, Reply
from serving.gateway.providers.continuation import Continuation
from serving.stream.client import StreamClient
from serving.stream.frames import Head, Headers

DONE = b"data: [DONE]\n\n"  # after it nothing comes in an event stream, by OpenAI's format
# Where going on in the middle of a reply is understood: see `serving.engine.vllm.resume`.
# Replies of other endpoints bear ids that another engine would draw anew.
_RESUMABLE = frozenset(("/v1/chat/completions", "/v1/completions"))


class Rejected(Exception):
    """The router refused the request."""

    def __init__(self, reason: RejectReason, retry_after_s: float | None) -> None:
        super().__init__(reason.value)
        self.reason = reason
        self.retry_after_s = retry_after_s


class EngineFailed(Exception):
    """The engine broke the response off, and no other took the request over."""


class Attempt:
    """One engine's try at an exchange: a stream on the connection to that engine.

    The shell's side of `router.scheduling.attempt.Attempt`; see there for its states.
    """

    __slots__ = (
        "booking",
        "connection",
        "exchange",
        "has_answered",
        "head",
        "num_taken_bytes",
    )

    def __init__(self, exchange: "Exchange", connection: StreamClient, booking: int) -> None:
        self.exchange = exchange
        self.connection = connection
        self.booking = booking  # names the stream on its connection
        self.head: Head | None = None  # what it would answer, until it does
        self.has_answered = False
        self.num_taken_bytes = 0  # taken by the client, not yet acknowledged

    @property
    def replica_id(self) -> str:
        return self.connection.replica_id


class Exchange:
    """Collects what an engine or a provider sends until the client's connection takes it.

    Holds at most the stream's window of bytes: the engine waits for the
    acknowledgement of what the client has taken.
    """

    __slots__ = (
        "_chunks",
        "_ended",
        "_error",
        "_waiter",
        "attempts",
        "body",
        "continuation",
        "created_s",
        "failed_s",
        "failure",
        "headers",
        "is_complete",
        "method",
        "num_attempts",
        "path",
        "reply",
        "request",
        "response_headers",
        "status",
        "usage",
    )

    def __init__(
        self,
        request: Request,
        method: str,
        path: str,
        headers: Headers,
        body: bytes,
        records: Records,
    ) -> None:
        """`records` bounds what is kept of all replies."""
        self.request = request
        self.method = method
        self.path = path
        self.headers = headers
        self.body = body
        self.created_s = int(time.time())
        # How it is answered.
        self.reply = Reply(records, can_resume=path in _RESUMABLE)
        self.attempts: list[Attempt] = []  # at engines: one, or two while it is hedged
        self.num_attempts = 0  # so far
        self.failure = ""  # of the last attempt, in words
        self.failed_s = 0.0  # when that was
        self.continuation: Continuation | None = None  # of what a provider has begun
        # What the client gets.
        self.status = 0
        self.response_headers: Headers = []
        self.is_complete = False  # the client has been sent all there is, but for the end
        self.usage: Usage | None = None  # as vLLM counted, once it has ended
        self._ended = False
        self._chunks: list[bytes] = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def on_head(self, status: int, headers: Headers) -> None:
        """Take status and headers, unless the client has those of a former attempt."""
        # Not passed on before the first byte of the body: until then the
        # request can still move to another engine without the client's notice.
        if not self.reply.has_begun:
            self.status, self.response_headers = status, headers

    def on_data(self, body: bytes) -> None:
        """Take bytes for the client, which `reply` has counted."""
        self._chunks.append(body)
        self.is_complete = body.endswith(DONE)
        self._wake()

    def on_end(self, error: Exception | None = None) -> None:
        """End the response: well, or with this error."""
        self._ended = True
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if (waiter := self._waiter) is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    async def next_chunk(self) -> bytes:
        """Return all body bytes that have come, b"" at the end.

        Raises `Rejected` or `EngineFailed` when that is how it ends.
        """
        while not self._chunks:
            if self._ended:
                if self._error is not None:
                    raise self._error
                return b""
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        chunks, self._chunks = self._chunks, []
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)
