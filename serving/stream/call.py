"""One request inside an engine replica: an ASGI call whose response leaves as frames."""

import asyncio
import logging
from collections.abc import Callable

from starlette.types import ASGIApp, Message

from router.resilience.resume import ResumeSplice, ResumeSpliceError
from serving.stream.account import RequestAccounting, current_account
from serving.stream.frames import Data, End, Head, Headers, Submit, ToGateway

logger = logging.getLogger(__name__)


class EngineDied(Exception):
    """Whatever the API layer says from here on is about that."""


class Stream:
    """Runs the request; ends with exactly one `End` frame, unless the engine dies.

    Then it ends with the connection (`on_dead`): what failed is no request, and
    vLLM's apology under status 200 must not reach the client. One that another
    engine has begun sends nothing of what the client has already; should the
    engine not come by the same bytes, it ends with an error.

    `window_bytes` bounds what is under way to a client that does not read:
    past it the response waits here, and vLLM merges the tokens that come
    meanwhile, until the gateway acknowledges.
    """

    def __init__(
        self,
        submit: Submit,
        account: RequestAccounting,
        window_bytes: int,
        post: Callable[[ToGateway], None],
        on_end: Callable[["Stream"], None],
        is_dead: Callable[[], bool],
        on_dead: Callable[[], None],
    ) -> None:
        self.id = submit.stream
        self._submit = submit
        self._account = account
        self._credit_bytes = window_bytes
        self._post = post
        self._on_end = on_end
        self._is_dead = is_dead
        self._on_dead = on_dead
        self._seam = ResumeSplice(submit.resume) if submit.resume is not None else None
        account.recorder.on_progress = self._report_progress
        self._credit = asyncio.Event()
        self._cancelled = asyncio.Event()
        self._body_taken = False
        self._complete = False
        self._task: asyncio.Task[None] | None = None

    def start(self, app: ASGIApp) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(app))

    def cancel(self) -> None:
        """The client left. vLLM sees a disconnect and aborts the request."""
        self._cancelled.set()
        self._credit.set()

    def acknowledge(self, num_bytes: int) -> None:
        self._credit_bytes += num_bytes
        self._credit.set()

    async def _run(self, app: ASGIApp) -> None:
        current_account.set(self._account)
        error: str | None = None
        can_retry = True
        try:
            await app(self._scope(), self._receive, self._send)
        except ConnectionResetError:
            error = "cancelled"
        except EngineDied:
            error = "the engine died"
        except ResumeSpliceError as seam:
            error, can_retry = str(seam), False
        except Exception as exception:
            if not self._cancelled.is_set():
                logger.exception("request %s failed", self._submit.request_id)
            error = f"{type(exception).__name__}: {exception}"
        finally:
            if error is None and not self._complete:
                error = "cancelled" if self._cancelled.is_set() else "the response broke off"
            if self._is_dead():
                self._on_dead()
            else:
                self._post(End(self.id, self._account.usage(), error, can_retry))
            self._on_end(self)

    def _report_progress(self) -> None:
        """Let the gateway know what was generated though nothing of it is due yet."""
        self._post(Data(self.id, b"", self._account.recorder.take()))

    def _scope(self) -> dict:
        submit = self._submit
        return {
            "type": "http",
            # Before 2.4 Starlette watches `receive` for the client's leaving
            # while it streams; later it waits for a failing `send`, which a
            # request that has no token yet never makes.
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": submit.method,
            "scheme": "http",
            "path": submit.path,
            "raw_path": submit.path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": submit.headers,
            "client": None,
            "server": None,
        }

    async def _receive(self) -> Message:
        if not self._body_taken:
            self._body_taken = True
            return {"type": "http.request", "body": self._submit.body, "more_body": False}
        await self._cancelled.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if self._cancelled.is_set():
            raise ConnectionResetError
        if self._is_dead():
            raise EngineDied
        if self._account.has_diverged:
            raise ResumeSpliceError("generated again, it differs from what had been sent")
        if message["type"] == "http.response.start":
            headers: Headers = [(bytes(name), bytes(value)) for name, value in message["headers"]]
            self._post(Head(self.id, message["status"], headers))
            return
        body = bytes(message.get("body", b""))
        if self._seam is not None:
            body = self._seam.cut(body, is_last=not message.get("more_body", False))
        if body:
            while self._credit_bytes <= 0 and not self._cancelled.is_set():
                self._credit.clear()
                await self._credit.wait()
            self._credit_bytes -= len(body)
            self._post(Data(self.id, body, self._account.recorder.take()))
        self._complete = not message.get("more_body", False)
