"""One generation that any number of clients read."""

import asyncio
from collections.abc import Callable

from serving.gateway.driver import Driver
from serving.gateway.exchange import EngineFailed, Exchange
from serving.stream.frames import Headers


class Subscriber:
    """One client's place in a flight; reads like an `Exchange`."""

    def __init__(self, flight: "SingleFlight") -> None:
        self.position = 0  # chunks read
        self._flight = flight
        self._waiter: asyncio.Future[None] | None = None
        self._left = False

    @property
    def status(self) -> int:
        return self._flight.exchange.status

    @property
    def response_headers(self) -> Headers:
        return self._flight.exchange.response_headers

    async def next_chunk(self) -> bytes:
        """Return all body bytes that have come, b"" at the end; raises as `Exchange` does."""
        while not self._left:
            chunk = self._flight.read(self)
            if chunk is not None:
                return chunk
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        raise EngineFailed("the client left")

    def leave(self) -> None:
        """The client needs no more; the generation ends with the last of them."""
        if not self._left:
            self._left = True
            self._flight.leave(self)
            self.wake()

    def wake(self) -> None:
        if (waiter := self._waiter) is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)


class SingleFlight:
    """Runs an exchange to its end and keeps what comes, for readers who join late.

    While `keep` grants the bytes the engine never waits for a reader. Past that
    nobody can join any more, what all have read is dropped, and the engine
    waits for the slowest, as it does for a client of its own.
    """

    def __init__(
        self,
        exchange: Exchange,
        driver: Driver,
        *,
        keep: Callable[["SingleFlight", int], bool],
        release: Callable[[int], None],
        on_end: Callable[["SingleFlight"], None],
    ) -> None:
        """Opens the exchange.

        `keep(self, n)` says whether n bytes may be kept; `release(n)` gives back
        all of them when the last reader has left. `on_end(self)` is called once:
        at the end, or when all have left before it.
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
        self._readers: set[Subscriber] = set()
        self._all_read: asyncio.Future[None] | None = None
        driver.open(exchange)
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def body(self) -> bytes | None:
        """The whole response, None unless it has ended well and is all here."""
        if self._ended and self._error is None and self.is_whole:
            return b"".join(self._chunks)
        return None

    def join(self) -> Subscriber:
        """A new reader, from the beginning; only while `is_whole`."""
        reader = Subscriber(self)
        self._readers.add(reader)
        return reader

    def leave(self, reader: Subscriber) -> None:
        self._readers.discard(reader)
        self._drop_what_all_have_read()
        if self._readers:
            return
        if not self._ended:
            self._end(EngineFailed("the clients left"))
            self._driver.cancel(self.exchange)
        num_bytes, self.num_kept_bytes = self.num_kept_bytes, 0
        self._release(num_bytes)

    def read(self, reader: Subscriber) -> bytes | None:
        """What has come since the reader's last look, b"" at the end, None if nothing has."""
        new = self._chunks[reader.position - self._num_dropped :]
        if not new:
            if not self._ended:
                return None
            if self._error is not None:
                raise self._error
            return b""
        reader.position += len(new)
        self._drop_what_all_have_read()
        return new[0] if len(new) == 1 else b"".join(new)

    async def _run(self) -> None:
        try:
            while chunk := await self.exchange.next_chunk():
                if self._ended:
                    return
                if self.is_whole:
                    if self._keep(self, len(chunk)):
                        self.num_kept_bytes += len(chunk)
                    else:
                        self.is_whole = False
                self._chunks.append(chunk)
                self._wake_all()
                if not self.is_whole:
                    self._drop_what_all_have_read()
                    if self._chunks:
                        self._all_read = asyncio.get_running_loop().create_future()
                        await self._all_read
                self._driver.taken(self.exchange, len(chunk))
            self._end(None)
        except Exception as error:  # `Rejected`, `EngineFailed`: the readers' to tell
            self._end(error)

    def _end(self, error: Exception | None) -> None:
        if self._on_end is None:
            return
        self._ended = True
        self._error = error
        on_end, self._on_end = self._on_end, None
        on_end(self)
        self._wake_all()

    def _wake_all(self) -> None:
        for reader in self._readers:
            reader.wake()

    def _drop_what_all_have_read(self) -> None:
        if self.is_whole:
            return
        num_read = min(
            (reader.position for reader in self._readers),
            default=self._num_dropped + len(self._chunks),
        )
        del self._chunks[: num_read - self._num_dropped]
        self._num_dropped = num_read
        if not self._chunks and self._all_read is not None:
            if not self._all_read.done():
                self._all_read.set_result(None)
            self._all_read = None
