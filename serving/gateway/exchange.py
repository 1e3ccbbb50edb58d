"""One client's request and its response, inside the gateway."""

import asyncio
import time

from router.resilience.resume import Reply
from router.types import RejectReason, Request, Usage
from serving.gateway.providers.continuation import Continuation
from serving.stream.frames import Headers

DONE = b"data: [DONE]\n\n"  # after it nothing comes in an event stream, by OpenAI's format


class Rejected(Exception):
    """The router refused the request."""

    def __init__(self, reason: RejectReason, retry_after_s: float | None) -> None:
        super().__init__(reason.value)
        self.reason = reason
        self.retry_after_s = retry_after_s


class EngineFailed(Exception):
    """The engine broke the response off, and no other took the request over."""


class Exchange:
    """Collects what the engine sends until the client's connection takes it.

    Holds at most the stream's window of bytes: the engine waits for the
    acknowledgement of what the client has taken.
    """

    __slots__ = (
        "_chunks",
        "_error",
        "_waiter",
        "body",
        "continuation",
        "created_s",
        "ended",
        "failed_s",
        "failure",
        "headers",
        "is_complete",
        "is_under_way",
        "method",
        "num_attempts",
        "num_error_replies",
        "num_taken_bytes",
        "path",
        "reply",
        "request",
        "response_headers",
        "second",
        "status",
        "usage",
    )

    def __init__(
        self, request: Request, method: str, path: str, headers: Headers, body: bytes
    ) -> None:
        self.request = request
        self.method = method
        self.path = path
        self.headers = headers
        self.body = body
        self.reply: Reply  # set by the driver that opens it
        # Another engine that was asked as well, and the booking there, until one of both answers.
        self.second: tuple[str, int] | None = None
        self.is_complete = False  # the client has been sent all there is, but for the end
        self.is_under_way = False  # its engine generates what will come all at once
        self.num_attempts = 0
        self.num_error_replies = 0  # 5xx, which were not passed on
        self.failure = ""  # of the last attempt, in words
        self.failed_s = 0.0  # when that was
        self.created_s = int(time.time())
        self.continuation: Continuation | None = None  # of what a provider has begun
        self.status = 0
        self.response_headers: Headers = []
        self.ended = False
        self.usage: Usage | None = None  # as vLLM counted, once it has ended
        self.num_taken_bytes = 0  # taken by the client, not yet acknowledged
        self._chunks: list[bytes] = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def on_head(self, status: int, headers: Headers) -> None:
        # Not passed on before the first byte of the body: until then the
        # request can still move to another engine without the client's notice.
        if not self.reply.has_begun:
            self.status, self.response_headers = status, headers

    def on_data(self, body: bytes) -> None:
        """These bytes, which `reply` has counted, are the client's."""
        self._chunks.append(body)
        self.is_complete = body.endswith(DONE)
        self._wake()

    def on_end(self, error: Exception | None = None) -> None:
        self.ended = True
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
            if self.ended:
                if self._error is not None:
                    raise self._error
                return b""
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        chunks, self._chunks = self._chunks, []
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)
