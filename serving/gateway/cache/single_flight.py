r"""How do any number of clients read one generation?

    running --all subscribers leave--> cancelled
       |    \--ends, or fails---------> ended: who subscribed reads what is left
       \--a byte may not be kept------> running, no longer whole: no client can join any more

While the response is whole the engine never waits for a subscriber. Once it is not, what all
have read is dropped, and the engine waits for the slowest, as it does for a client of its own.
"""

import asyncio
from collections.abc import Callable

from serving.gateway.driver import Driver
from serving.gateway.exchange import EngineFailed, Exchange, tell_nobody
from serving.stream.frames import Headers


class Subscriber:
    """One client's place in a single flight; read like an `Exchange`."""

    def __init__(self, flight: "SingleFlight") -> None:
        self.position = 0  # chunks read
        self.on_readable: Callable[[], None] = tell_nobody  # there is more to `read`
        self._flight = flight
        self._is_closed = False

    @property
    def status(self) -> int:
        return self._flight.exchange.status

    @property
    def response_headers(self) -> Headers:
        return self._flight.exchange.response_headers

    def read(self) -> bytes | None:
        """Return all body bytes that have come, b"" at the end, None while there are none.

        Raises as `Exchange` does.
        """
        return self._flight.read_new(self)

    @property
    def is_at_end(self) -> bool:
        """Whether it has ended well, and all of it has been read."""
        return self._flight.is_at_end(self)

    def close(self) -> None:
        """Read no more; the generation ends with its last subscriber."""
        if not self._is_closed:
            self._is_closed = True
            self._flight.unsubscribe(self)


class SingleFlight:
    """Runs an exchange to its end and keeps what comes, for subscribers who join late."""

    def __init__(
        self,
        exchange: Exchange,
        driver: Driver,
        *,
        keep: Callable[["SingleFlight", int], bool],
        release: Callable[[int], None],
        on_end: Callable[["SingleFlight"], None],
    ) -> None:
        """Open the exchange.

        `keep(self, n)` says whether n bytes may be kept; `release(n)` gives back all of them
        when the last subscriber has left. `on_end(self)` is called once: at the end, or when
        all have left before it.
        """
        self.exchange = exchange
        self.num_kept_bytes = 0
        self.is_whole = True  # all of the response is still here
        self._driver = driver
        self._keep = keep
        self._release = release
        self._on_end: Callable[[SingleFlight], None] | None = on_end
        self._chunks: list[bytes] = []
        self._num_dropped = 0  # chunks
        self._ended = False
        self._error: Exception | None = None
        self._subscribers: set[Subscriber] = set()
        self._num_unread_bytes = 0  # that all subscribers have to read before there are more
        self._is_due = False
        self._call_soon = asyncio.get_running_loop().call_soon
        exchange.on_readable = self._wake
        driver.open(exchange)

    @property
    def body(self) -> bytes | None:
        """The whole response; None unless it has ended well and is all here."""
        if self._ended and self._error is None and self.is_whole:
            return b"".join(self._chunks)
        return None

    def subscribe(self) -> Subscriber:
        """Return a new subscriber, at the beginning; only while `is_whole`."""
        subscriber = Subscriber(self)
        self._subscribers.add(subscriber)
        return subscriber

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Forget a subscriber. With the last one the generation ends, and its bytes are freed."""
        self._subscribers.discard(subscriber)
        self._drop_read_chunks()
        if self._subscribers:
            return
        if not self._ended:
            self._end(EngineFailed("the clients left"))
            self._driver.cancel(self.exchange)
        num_bytes, self.num_kept_bytes = self.num_kept_bytes, 0
        self._release(num_bytes)

    def read_new(self, subscriber: Subscriber) -> bytes | None:
        """Return what has come since its last call, b"" at the end, None if nothing has."""
        new = self._chunks[subscriber.position - self._num_dropped :]
        if not new:
            if not self._ended:
                return None
            if self._error is not None:
                raise self._error
            return b""
        subscriber.position += len(new)
        self._drop_read_chunks()
        return new[0] if len(new) == 1 else b"".join(new)

    def is_at_end(self, subscriber: Subscriber) -> bool:
        """Whether the generation has ended well, and a subscriber has read all of it."""
        has_read_all = subscriber.position == self._num_dropped + len(self._chunks)
        return self._ended and self._error is None and has_read_all

    def _wake(self) -> None:
        """Look soon what has come: not within the call that brings it."""
        if not self._is_due:
            self._is_due = True
            self._call_soon(self._read_on)

    def _read_on(self) -> None:
        self._is_due = False
        if self._ended or self._num_unread_bytes:
            return
        try:
            chunk = self.exchange.read()
            if chunk:
                self._take(chunk)
            elif chunk is not None:
                self._end(None)
        except Exception as error:  # `Rejected`, `EngineFailed`: raised to the subscribers
            self._end(error)

    def _take(self, chunk: bytes) -> None:
        """Keep what has come for the subscribers. Let the engine go on once it may."""
        if self.is_whole:
            if self._keep(self, len(chunk)):
                self.num_kept_bytes += len(chunk)
            else:
                self.is_whole = False
        self._chunks.append(chunk)
        self._wake_all()
        if self.is_whole:
            self._go_on(len(chunk))
        else:
            self._num_unread_bytes = len(chunk)
            self._drop_read_chunks()

    def _go_on(self, num_bytes: int) -> None:
        """Let the engine send so many bytes more, and read what it has sent meanwhile."""
        self._driver.acknowledge_bytes(self.exchange, num_bytes)
        self._wake()

    def _end(self, error: Exception | None) -> None:
        if self._on_end is None:
            return
        self._ended = True
        self._error = error
        on_end, self._on_end = self._on_end, None
        on_end(self)
        self._wake_all()

    def _wake_all(self) -> None:
        for subscriber in self._subscribers:
            subscriber.on_readable()

    def _drop_read_chunks(self) -> None:
        """Drop what all have read, unless the response is still whole."""
        if self.is_whole:
            return
        num_read = min(
            (subscriber.position for subscriber in self._subscribers),
            default=self._num_dropped + len(self._chunks),
        )
        del self._chunks[: num_read - self._num_dropped]
        self._num_dropped = num_read
        if not self._chunks and self._num_unread_bytes:
            num_bytes, self._num_unread_bytes = self._num_unread_bytes, 0
            self._go_on(num_bytes)
