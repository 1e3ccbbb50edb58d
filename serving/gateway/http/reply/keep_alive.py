"""How does an event stream that has not begun yet stay open behind a proxy?"""

import asyncio
from collections.abc import Callable

from serving.gateway.http.reply.client import Client
from serving.stream.frames import Headers

_COMMENT = ": keep-alive{}\n\n"


class KeepAlive:
    """Sends a comment every `period_s` until the reply begins; clients skip comments.

    The first one commits the reply to status 200: what fails after it is an event of the stream.
    """

    def __init__(
        self,
        period_s: float,
        client: Client,
        headers: Headers,
        waits_for: Callable[[], str] = str,
    ) -> None:
        """`waits_for` returns what the reply waits for, in words for people, "" if nothing."""
        self._has_begun = False  # the client has status and headers
        self._period_s = period_s
        self._client = client
        self._headers = headers
        self._waits_for = waits_for
        self._call_later = asyncio.get_running_loop().call_later
        self._timer = self._call_later(period_s, self._send)

    def _send(self) -> None:
        self._timer = self._call_later(self._period_s, self._send)
        if not self._has_begun:
            self._has_begun = True
            headers = [*self._headers, (b"content-type", b"text/event-stream; charset=utf-8")]
            self._client.start(200, as_stream(headers))
        if self._client.is_ready:
            reason = self._waits_for()
            self._client.write(_COMMENT.format(reason and f", {reason}").encode())

    def stop(self) -> bool:
        """Send no more. Return whether the client has status and headers."""
        self._timer.cancel()
        return self._has_begun


def as_stream(headers: Headers) -> Headers:
    """Return a reply's headers, an event stream's with those that keep proxies from buffering."""
    for name, value in headers:
        if name == b"content-type":
            if value.startswith(b"text/event-stream"):
                break
            return headers
    else:
        return headers
    names = {name for name, _ in headers}
    headers = list(headers)
    if b"cache-control" not in names:
        headers.append((b"cache-control", b"no-cache"))
    if b"x-accel-buffering" not in names:
        headers.append((b"x-accel-buffering", b"no"))
    return headers


def as_event(body: bytes, kind: bytes = b"") -> bytes:
    """Return a whole body as one event of a stream, of that kind if the stream names them."""
    name = b"event: %b\n" % kind if kind else b""
    return name + b"data: " + body.strip().replace(b"\n", b"\ndata: ") + b"\n\n"
