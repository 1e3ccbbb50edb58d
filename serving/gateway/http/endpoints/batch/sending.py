"""How is one line of a batch answered? As a request of a client of ours, on the gateway's own path.

It is admitted, held, placed, retried, charged and logged like any other; its client is the batch.
"""

import asyncio
import logging
from typing import NamedTuple

from starlette.types import Scope

from serving.gateway.http.errors import ApiError, internal_error
from serving.gateway.http.own_headers import new_id, set_own_headers
from serving.gateway.request_path import RequestPath
from serving.gateway.tenants.tenants import Caller
from serving.stream.frames import Headers

logger = logging.getLogger(__name__)

_HEADERS: Headers = [(b"content-type", b"application/json"), (b"x-headway-class", b"batch")]
_MAX_REPLY_BYTES = 64 * 2**20  # each is in memory as a whole
# Of those that may pass with time: how long to wait where the reply does not say.
_WAIT_S = 1.0


class Answer(NamedTuple):
    """What the gateway has answered."""

    status: int
    request_id: str
    body: bytes
    wait_s: float | None  # after which the same may be answered better; None: it will not

    @property
    def is_error(self) -> bool:
        """Whether it belongs into the error file."""
        return self.status >= 400


class LineClient:
    """The client of one line: takes a reply that is not streamed as a whole."""

    def __init__(self, request_id: str) -> None:
        self.answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._request_id = request_id
        self._status = 0
        self._wait_s: float | None = None
        self._chunks: list[bytes] = []
        self._num_bytes = 0

    @property
    def is_ready(self) -> bool:
        """It always is."""
        return True

    def start(self, status: int, headers: Headers) -> None:
        """Begin the reply."""
        self._status = status
        self._wait_s = _wait_s(status, headers)

    def write(self, body: bytes, *, is_last: bool = False) -> None:
        """Take bytes of the body."""
        self._num_bytes += len(body)
        if self._num_bytes <= _MAX_REPLY_BYTES:
            self._chunks.append(body)
        if is_last:
            self._end()

    def break_off(self, error: Exception) -> None:
        """Take an internal error for the answer."""
        logger.error("a line of a batch failed", exc_info=error)
        self._status, self._wait_s = 500, None
        self._chunks = [internal_error(f"request {self._request_id}").body()]
        self._end()

    def _end(self) -> None:
        if self.answer.done():
            return
        if self._num_bytes > _MAX_REPLY_BYTES:
            error = ApiError(500, f"The reply is larger than {_MAX_REPLY_BYTES} bytes.")
            self._status, self._wait_s, self._chunks = 500, None, [error.body()]
        body = b"".join(self._chunks)
        self.answer.set_result(Answer(self._status, self._request_id, body, self._wait_s))


def _wait_s(status: int, headers: Headers) -> float | None:
    """Return when to come back, seconds; None if that is of no use.

    A 429 without `Retry-After` is of a request that can never pass.
    """
    if status not in (429, 502, 503):
        return None
    found = next((value for name, value in headers if name == b"retry-after"), None)
    if found is not None:
        return float(found)
    return None if status == 429 else _WAIT_S


async def send_line(path: RequestPath, caller: Caller | None, url: str, body: bytes) -> Answer:
    """Have a line answered. Cancelled, it is aborted."""
    request_id = new_id()
    scope: Scope = {
        "type": "http",
        "method": "POST",
        "path": url,
        "headers": list(_HEADERS),
        "state": {"caller": caller},
    }
    set_own_headers(scope, request_id, [])
    client = LineClient(request_id)
    call = path.open(scope, client)
    try:
        if call.begin() and call.on_body(body):
            call.on_body_end()
        return await client.answer
    except Exception as error:
        client.break_off(error)
        return client.answer.result()
    finally:
        if not client.answer.done() or client.answer.cancelled():
            call.on_left()
