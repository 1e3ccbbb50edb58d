"""One client's request, the engines that try it, and the response on its way to the client."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

import msgspec

from router import RejectReason, Request, Usage
from router.resilience.resume import Records, Reply
from serving.engine.external.continuation import Continuation as ExternalReply
from serving.gateway.intake.fields import Fields, ResponseFields
from serving.gateway.intake.json_body import with_fields
from serving.gateway.observe.journey import Journey
from serving.gateway.providers.continuation import Continuation
from serving.stream.client import Connection
from serving.stream.frames import Head, Headers
from serving.stream.record import count_tokens

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"  # after it nothing comes in an event stream, by OpenAI's format
# Likewise by the formats of streams that name their events; text has no line that begins so.
_LAST_EVENTS = {
    "/v1/messages": b"event: message_stop\n",
    "/v1/responses": b"event: response.completed\n",
}
# Where going on in the middle of a reply is understood: see `serving.engine.vllm.resume`.
# Replies of other endpoints bear ids that another engine would draw anew.
_RESUMABLE = frozenset(("/v1/chat/completions", "/v1/completions", *_LAST_EVENTS))


class Turn:
    """Those who read exchanges: who has something to read does so when all that came is told of.

    Bytes that came for one of them together leave together, and what a reader does meets nobody in
    the middle of something. What an engine sends in one piece is read in the call that brings it:
    another turn of the event loop would cost as much as to write a token.
    """

    def __init__(self) -> None:
        self.call_soon = asyncio.get_running_loop().call_soon
        self._readers: list[Callable[[], None]] = []
        self._is_held = False

    def add(self, read: Callable[[], None]) -> None:
        """Have `read` called at the end of what happens now."""
        if not self._readers and not self._is_held:
            self.call_soon(self._run)
        self._readers.append(read)

    def hold(self) -> None:
        """Collect readers until `release`."""
        self._is_held = True

    def release(self) -> None:
        """Let them read."""
        self._is_held = False
        self._run()

    def _run(self) -> None:
        readers, self._readers = self._readers, []
        for read in readers:
            try:
                read()
            except Exception:  # others wait for their turn
                logger.exception("a reader failed")


class Rejected(Exception):
    """The router refused the request."""

    def __init__(self, reason: RejectReason, retry_after_s: float | None) -> None:
        super().__init__(reason.value)
        self.reason = reason
        self.retry_after_s = retry_after_s


class EngineFailed(Exception):
    """The engine broke the response off, and no other took the request over."""


class ClientLeft(EngineFailed):
    """The client left before the end; told to whoever still listens."""


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

    def __init__(self, exchange: "Exchange", connection: Connection, booking: int) -> None:
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
        "_last_event",
        "_records",
        "_taken",
        "added",
        "attempts",
        "body",
        "continuation",
        "created_s",
        "external_reply",
        "failed_s",
        "failure",
        "fields",
        "headers",
        "is_complete",
        "is_open",
        "journey",
        "method",
        "num_prompt_tokens",
        "on_ended",
        "on_readable",
        "path",
        "replica_id",
        "reply",
        "request",
        "response_headers",
        "status",
        "usage",
        "was_sent",
    )

    def __init__(
        self,
        request: Request,
        method: str,
        path: str,
        headers: Headers,
        body: bytes,
        records: Records,
        *,
        fields: Fields,
        added: Mapping[str, str | int],
    ) -> None:
        """`records` bounds what is kept of all replies.

        `fields` are what we read of the body; engines get `added` on top of it, providers do not.
        """
        self.request = request
        self.method = method
        self.path = path
        self.headers = headers
        self.body = body
        self.fields = fields
        self.added = added
        self.created_s = int(time.time())
        self.journey = Journey()
        # How it is answered.
        # What runs in the background is that engine's alone.
        self._records = records
        is_bound = isinstance(fields, ResponseFields) and bool(fields.background)
        self.reply = Reply(records, can_resume=path in _RESUMABLE and not is_bound)
        self.replica_id = ""  # the engine that answers
        self.attempts: list[Attempt] = []  # at engines: one, or two while it is hedged
        self.was_sent = False  # to an engine or to a provider
        self.num_prompt_tokens = request.num_prompt_tokens  # an estimate, until vLLM has counted
        self.failure = ""  # of the last attempt, in words
        self.failed_s = 0.0  # when that was
        self.continuation: Continuation | None = None  # of what a provider has begun
        # What servers that are not ours have sent of it.
        self.external_reply: ExternalReply | None = None
        # What the client gets.
        self.status = 0
        self.response_headers: Headers = []
        self.is_complete = False  # the client has been sent all there is, but for the end
        self.usage: Usage | None = None  # as vLLM counted, once it has ended
        self._last_event = _LAST_EVENTS.get(path)
        self._ended = False
        self._chunks: list[bytes] = []
        self._error: Exception | None = None
        self.on_readable: Callable[[], None] = tell_nobody  # there is more to `read`
        self.is_open = False
        self.on_ended: Callable[[], None] = tell_nobody
        self._taken: Usage | None = Usage()

    def engine_body(self) -> bytes:
        """Return the body for an engine."""
        return with_fields(self.body, self.added)

    def bind_to(self, replica_id: str) -> None:
        """Have it served by this engine alone, and by no other from the middle on."""
        self.request = msgspec.structs.replace(self.request, only_at=replica_id, engines_only=True)
        self.reply.end()
        self.reply = Reply(self._records, can_resume=False)

    def headers_of_way(self) -> Headers:
        """Return which engine answers, and how long the request was held before it was sent."""
        if not self.replica_id:
            return []
        held_s = max(0.0, self.journey.sent_s - self.request.arrival_s)
        return [
            (b"x-headway-engine", self.replica_id.encode()),
            (b"x-headway-held-ms", b"%d" % round(held_s * 1000)),
        ]

    def on_head(self, status: int, headers: Headers) -> None:
        """Take status and headers, unless the client has those of a former attempt."""
        # Not passed on before the first byte of the body: until then the
        # request can still move to another engine without the client's notice.
        if not self.reply.has_begun:
            self.status, self.response_headers = status, headers

    def on_data(self, body: bytes) -> None:
        """Take bytes for the client, which `reply` has counted."""
        self._chunks.append(body)
        if self._last_event is None:
            self.is_complete = body.endswith(DONE)
        elif self._last_event in body:
            self.is_complete = True
        self.on_readable()

    def on_end(self, error: Exception | None = None) -> None:
        """End the response: well, or with this error."""
        self.is_open = False
        self._ended = True
        self._error = error
        self._taken = self._count_taken()
        self.reply.end()
        self.on_readable()
        self.on_ended()
        # Who is told knows this exchange, too: neither should keep the other.
        self.on_readable = self.on_ended = tell_nobody

    def usage_taken(self) -> Usage | None:
        """Return what the request of a tenant took, once it has ended; nothing if it never began.

        None where it took something that nobody has counted.
        """
        return self._taken

    def _count_taken(self) -> Usage | None:
        if self.usage is not None:
            return self.usage
        if not self.request.tenant:
            return None  # nobody is charged
        if not self.was_sent or self.status >= 400:
            return Usage()
        reply = self.reply
        if self.continuation is not None:
            num_output_tokens = self.continuation.num_tokens
        else:
            try:
                num_output_tokens = count_tokens(reply.generated)
            except msgspec.MsgspecError:
                return None  # an engine of somebody else's, perhaps
        if not (reply.has_begun or num_output_tokens):
            if not isinstance(self._error, ClientLeft):
                return Usage()  # it failed, and the client has nothing of it
        elif not num_output_tokens and self.request.max_output_tokens != 0:
            return None  # nobody kept a record
        return Usage(num_prompt_tokens=self.num_prompt_tokens, num_output_tokens=num_output_tokens)

    def read(self) -> bytes | None:
        """Return all body bytes that have come, b"" at the end, None while there are none.

        Raises `Rejected` or `EngineFailed` when that is how it ends.
        """
        chunks = self._chunks
        if not chunks:
            if not self._ended:
                return None
            if self._error is not None:
                raise self._error
            return b""
        self._chunks = []
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    @property
    def is_at_end(self) -> bool:
        """Whether it has ended well, and all of it has been read."""
        return self._ended and not self._chunks and self._error is None


def tell_nobody() -> None:
    """Do nothing: there is nobody yet, or nobody any more, who wants to know."""
