"""How does an engine's replica run one request, and what does it send of the response?"""

import asyncio
import logging
from collections.abc import Callable

import msgspec
from starlette.types import ASGIApp, Message

from router.resilience.resume import ResumeSplice, ResumeSpliceError
from serving.stream.accounting import RequestAccounting, current_accounting
from serving.stream.frames import Data, End, Head, Headers, Prompt, Submit, ToGateway

logger = logging.getLogger(__name__)


class EngineDied(Exception):
    """The engine died: whatever the API layer sends from now on is an apology for that."""


class AsgiCall:
    """Call the engine's ASGI application for one stream; send the response as frames.

    | the call ends because                       | the gateway receives           |
    |---------------------------------------------|--------------------------------|
    | the response is complete, whatever follows  | `End` without an error         |
    | the gateway cancelled it, or disconnected   | `End`: "cancelled"             |
    | the application raised, or sent too little  | `End` with the error           |
    | a resumed response differs from what was    | `End` with the error, which    |
    | sent before                                 | says that a retry is no use    |
    | the engine died                             | no `End`: `on_dead` closes the |
    |                                             | connection                     |

    The last row, because the request is not what failed, and because vLLM's
    apology under status 200 must not reach the client. A resumed request sends
    nothing of what the client already has. A stream that begins with an error is
    answered with that error and its status: vLLM sends 200 before it looks at all
    of a request. What a stream of the Responses API says before its first token leaves with
    that: until then another engine may still begin it, and the first byte tells that it began.

    `window_bytes` bounds what is on its way to a client that does not read: beyond
    it the response waits here until the gateway acknowledges, and vLLM merges
    the tokens that come meanwhile.
    """

    def __init__(
        self,
        submit: Submit,
        window_bytes: int,
        post: Callable[[ToGateway], None],
        on_end: Callable[["AsgiCall"], None],
        is_dead: Callable[[], bool],
        on_dead: Callable[[], None],
    ) -> None:
        self.stream = submit.stream
        self.accounting = RequestAccounting(
            submit.num_prompt_tokens,
            submit.priority,
            num_expected_cached_tokens=submit.num_cached_tokens,
            request_id=submit.request_id,
            created_s=submit.created_s,
            resume=submit.resume,
            on_prompt=self._post_prompt,
            on_progress=self._post_progress,
        )
        self._submit = submit
        self._credit_bytes = window_bytes
        self._post = post
        self._on_end = on_end
        self._is_dead = is_dead
        self._on_dead = on_dead
        self._splice = ResumeSplice(submit.resume) if submit.resume is not None else None
        self._credit = asyncio.Event()
        self._cancelled = asyncio.Event()
        self._head: Head | None = None  # until the body begins
        self._preamble = b""
        self._body_was_read = False
        self._is_complete = False
        self._task: asyncio.Task[None] | None = None

    def start(self, app: ASGIApp) -> None:
        """Begin to run the request in a task of its own."""
        self._task = asyncio.get_running_loop().create_task(self._run(app))

    def cancel(self) -> None:
        """Let vLLM see that the client disconnected: it aborts the request."""
        self._cancelled.set()
        self._credit.set()

    def acknowledge(self, num_bytes: int) -> None:
        """Allow so many bytes more to be sent: the client has read as many."""
        self._credit_bytes += num_bytes
        self._credit.set()

    async def _run(self, app: ASGIApp) -> None:
        current_accounting.set(self.accounting)
        error: str | None = None
        can_retry = True
        try:
            await app(self._scope(), self._receive, self._send)
        except ConnectionResetError:
            error = "cancelled"
        except EngineDied:
            error = "the engine died"
        except ResumeSpliceError as difference:
            error, can_retry = str(difference), False
        except Exception as exception:
            if not self._cancelled.is_set():
                logger.exception("request %s failed", self._submit.request_id)
            error = f"{type(exception).__name__}: {exception}"
        finally:
            if self._is_complete:
                error = None  # what fails after the reply is nobody's concern, but for the log
            elif error is None:
                error = "cancelled" if self._cancelled.is_set() else "the response broke off"
            if self._is_dead():
                self._on_dead()
            else:
                self._post(End(self.stream, self.accounting.usage(), error, can_retry))
            self._on_end(self)

    def _post_prompt(self, num_tokens: int, block_hashes: list[int]) -> None:
        self._post(Prompt(self.stream, num_tokens, block_hashes))

    def _post_progress(self) -> None:
        """Send what was recorded although nothing of the body is due yet."""
        self._post(Data(self.stream, b"", self.accounting.recorder.take_groups()))

    def _scope(self) -> dict:
        submit = self._submit
        path, _, query = submit.path.partition("?")
        return {
            "type": "http",
            # With an older version Starlette watches `receive` for a disconnect while it
            # streams. From 2.4 on it waits for `send` to fail, and a request that has no
            # token yet never calls that.
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": submit.method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": submit.headers,
            "client": None,
            "server": None,
        }

    async def _receive(self) -> Message:
        if not self._body_was_read:
            self._body_was_read = True
            return {"type": "http.request", "body": self._submit.body, "more_body": False}
        await self._cancelled.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if self._cancelled.is_set():
            raise ConnectionResetError
        if self._is_dead():
            raise EngineDied
        if self.accounting.has_diverged:
            raise ResumeSpliceError("generated again, it differs from what had been sent")
        if message["type"] == "http.response.start":
            headers: Headers = [(bytes(name), bytes(value)) for name, value in message["headers"]]
            self._head = Head(self.stream, message["status"], headers)
            return
        if self._is_complete:
            return  # it was an error, and vLLM adds that the stream is done
        body = bytes(message.get("body", b""))
        if body.startswith(_PREAMBLE) and _IN_BACKGROUND not in body:
            self._preamble += body
            return
        if self._preamble and not body.startswith(_ERROR):
            body, self._preamble = self._preamble + body, b""
        if self._head is not None:
            head, self._head = self._head, None
            if self._splice is None and (refusal := _refusal(head, body)) is not None:
                head, body = refusal
                message = {"type": "http.response.body", "more_body": False}
            self._post(head)
        if self._splice is not None:
            body = self._splice.cut(body, is_last=not message.get("more_body", False))
        if body:
            while self._credit_bytes <= 0 and not self._cancelled.is_set():
                self._credit.clear()
                await self._credit.wait()
            self._credit_bytes -= len(body)
            self._post(Data(self.stream, body, self.accounting.recorder.take_groups()))
        self._is_complete = not message.get("more_body", False)


class _Error(msgspec.Struct):
    code: int


class _ErrorEvent(msgspec.Struct):
    error: _Error


_EVENT, _EVENT_END = b"data: ", b"\n\n"
_ERROR = _EVENT + b'{"error":'
_PREAMBLE = (b"event: response.created\n", b"event: response.in_progress\n")
_IN_BACKGROUND = b'"background":true'  # no token comes by this call's own doing
_decode_error = msgspec.json.Decoder(_ErrorEvent).decode


def _refusal(head: Head, body: bytes) -> tuple[Head, bytes] | None:
    """Return the reply with its own status if a stream begins with an error, None if not."""
    if head.status != 200 or not body.startswith(_ERROR):
        return None
    content, separator, _ = body.removeprefix(_EVENT).partition(_EVENT_END)
    try:
        status = _decode_error(content).error.code
    except msgspec.MsgspecError:
        return None
    if not separator or not 400 <= status <= 599:
        return None
    headers = [(name, value) for name, value in head.headers if name.lower() != b"content-type"]
    return Head(head.stream, status, [*headers, (b"content-type", b"application/json")]), content
