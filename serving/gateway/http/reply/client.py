"""Who asks and is answered? One request's client, whatever server its connection is at.

Nothing here awaits: a token is written by the callback that brings it. A client that does not
read is not `is_ready`, and whoever answers waits for `ClientEvents.on_ready`.
"""

from collections.abc import Callable
from typing import Protocol

from serving.gateway.http.errors import ApiError
from serving.stream.frames import Headers


class Client(Protocol):
    """Takes one reply. Once its client has left it takes everything, and does nothing."""

    @property
    def is_ready(self) -> bool:
        """Whether it has taken what it got so far; then it should get more."""
        ...

    def start(self, status: int, headers: Headers) -> None:
        """Begin the reply; it goes out with its first bytes."""
        ...

    def write(self, body: bytes, *, is_last: bool = False) -> None:
        """Send bytes of the body. Raise `RuntimeError` if they contradict the head."""
        ...

    def break_off(self, error: Exception) -> None:
        """End a reply that has begun, so that it is seen to be incomplete; log `error`."""
        ...


class Source(Protocol):
    """What a reply is read from: an exchange, a place in a single flight, a stored response."""

    on_readable: Callable[[], None]

    @property
    def status(self) -> int: ...
    @property
    def response_headers(self) -> Headers: ...
    @property
    def is_at_end(self) -> bool: ...
    def read(self) -> bytes | None: ...


class ClientEvents(Protocol):
    """Whoever answers, told of what the client does."""

    def begin(self) -> bool:
        """Look at the head of the request. Return whether its body is wanted: if not, refuse it."""
        ...

    def on_body(self, data: bytes) -> bool:
        """Take a part of the body. Return whether more of it is wanted."""
        ...

    def on_body_end(self) -> None: ...
    def on_ready(self) -> None: ...
    def on_left(self) -> None: ...


def send_error(client: Client, error: ApiError, own_headers: Headers, path: str = "") -> None:
    """Answer with an error, in the form that clients of `path` read."""
    status, headers, body = error.reply(own_headers, path)
    client.start(status, headers)
    client.write(body, is_last=True)
