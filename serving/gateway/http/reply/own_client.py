"""How does our own listener write a reply? HTTP/1.1, straight to the connection."""

import logging

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from serving.gateway.http.own_headers import request_id_of
from serving.stream.frames import Headers

logger = logging.getLogger(__name__)

_NO_BODY = (204, 304)
_FRAMING = frozenset((b"content-length", b"transfer-encoding", b"connection"))


class OwnClient:
    """The client of one request on a connection of ours.

    uvicorn's cycle keeps how far request and reply are; uvicorn goes by it when it takes the
    next request or closes the connection. Head and first bytes leave in one write.
    """

    __slots__ = ("_cycle", "_head", "_is_chunked", "_num_left")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._head = b""  # until the first bytes of the body
        self._is_chunked = False
        self._num_left: int | None = None  # of the body that the head has announced

    @property
    def is_ready(self) -> bool:
        """Whether the send buffer is not full."""
        return not self._cycle.flow.write_paused

    def start(self, status: int, headers: Headers) -> None:
        """Begin the reply. Raise `RuntimeError` for a header that would break out of its line."""
        cycle = self._cycle
        cycle.response_started, cycle.waiting_for_100_continue = True, False
        lines = [STATUS_LINE[status]]
        for name, value in (*cycle.default_headers, *headers):
            lower = name.lower()
            if lower in _FRAMING:
                if lower == b"content-length":
                    self._num_left = int(value)
                elif lower == b"transfer-encoding":
                    continue  # between the engine and us
                elif b"close" in value.lower():
                    cycle.keep_alive = False
                    continue
            lines.append(b"%b: %b\r\n" % (lower, value))
        if not cycle.keep_alive:
            lines.append(b"connection: close\r\n")
        if self._num_left is None and status not in _NO_BODY and not self._is_old:
            self._is_chunked = True
            lines.append(b"transfer-encoding: chunked\r\n")
        head = b"".join(lines)
        if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines) or b"\0" in head:
            raise RuntimeError("a header of the reply is none")
        self._head = head + b"\r\n"

    @property
    def _is_old(self) -> bool:
        """Whether the client speaks HTTP/1.0, which knows no chunks: the connection's end is it."""
        return self._cycle.scope["http_version"] == "1.0"

    def write(self, body: bytes, *, is_last: bool = False) -> None:
        """Send bytes of the body. Raise `RuntimeError` for more, or less, than was announced."""
        cycle = self._cycle
        if cycle.disconnected:
            return
        head, self._head = self._head, b""
        if self._is_chunked:
            chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            data = b"%b%b0\r\n\r\n" % (head, chunk) if is_last else head + chunk
        else:
            if self._num_left is not None:
                self._num_left -= len(body)
                if self._num_left < 0 or (is_last and self._num_left):
                    raise RuntimeError("the reply is not as long as its head says")
            data = head + body
        if data:
            cycle.transport.write(data)
        if is_last:
            cycle.response_complete = True
            if not cycle.keep_alive:
                cycle.transport.close()
            cycle.on_response()

    def break_off(self, error: Exception) -> None:
        """Close the connection: a reply without its end is seen to be incomplete."""
        error.add_note(f"request {request_id_of(self._cycle.scope)}")  # type: ignore[arg-type]
        logger.error("a reply broke off", exc_info=error)
        self._cycle.transport.close()
