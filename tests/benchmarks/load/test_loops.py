"""The load generator against a small server whose every reply is scripted."""

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Awaitable, Callable

from benchmarks.load.loops import ClosedLoop, open_loop, poisson_offsets_s
from serving.capacity.client import ApiRequest, Client, Record

Reply = Callable[[asyncio.StreamWriter], Awaitable[None]]

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_REQUEST = ApiRequest.chat("any", "hi", 3, stream=True)


class Server:
    """Answers every request with `reply`; counts connections and requests."""

    def __init__(self, reply: Reply) -> None:
        self.num_connections = self.num_requests = self.num_open = 0
        self._reply = reply

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *exception: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self.num_open += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.split(b"content-length: ")[1].split()[0]))
                self.num_requests += 1
                await self._reply(writer)
                await writer.drain()
        self.num_open -= 1
        writer.close()


def chunk(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


def events(*pieces: bytes, end: bytes = b"0\r\n\r\n") -> Reply:
    async def reply(writer: asyncio.StreamWriter) -> None:
        writer.write(_HEAD)
        for piece in pieces:
            writer.write(chunk(piece))
        writer.write(end)

    return reply


def plain(status: str, body: bytes) -> Reply:
    async def reply(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n" % (status.encode(), len(body)))
        writer.write(body)

    return reply


def send(reply: Reply, request: ApiRequest = _REQUEST) -> Record:
    """Send one request to a server with this reply. Return its record."""

    async def run() -> Record:
        async with Server(reply) as url, Client([url]) as client:
            return (await open_loop(client, [(0.0, request)], timeout_s=0.3))[0]

    return asyncio.run(run())


def test_counts_events_and_reads_usage() -> None:
    """`[DONE]` is no event; usage is found wherever the response ends."""
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\n'
    record = send(events(b"data: 1\n\n", b"data: 2\n\ndata: 3\n\n", usage, b"data: [DONE]\n\n"))
    assert (record.completed, record.num_events, record.num_output_tokens) == (True, 4, 3)
    assert 0 < record.sent_s <= record.first_s <= record.last_s


def test_counts_events_however_they_are_cut() -> None:
    whole = b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"
    for size in range(2, len(whole)):
        pieces = [whole[start : start + size] for start in range(0, len(whole), size)]
        record = send(events(*pieces))
        assert (record.completed, record.num_events) == (True, 2), size


def test_whole_reply() -> None:
    body = b'{"choices":[],"usage":{"completion_tokens": 12}}'
    record = send(plain("200 OK", body), ApiRequest.chat("any", "hi", 12, stream=False))
    assert (record.completed, record.num_output_tokens, record.num_events) == (True, 12, 0)


def test_errors_are_told_apart() -> None:
    """A stream that ends early or with an error event is not completed, though it is a 200."""
    cases = {
        "HTTP 429: too many": plain("429 Too Many Requests", b"too many"),
        "the stream ended without [DONE]": events(b"data: 1\n\n"),
        'error event: {"error":1}': events(b'data: {"error":1}\n\ndata: [DONE]\n\n'),
        "not ended after 0.3 s": events(b"data: 1\n\n", end=b""),
        "not HTTP": _garbage,
        "connection lost": _hang_up,
    }
    for error, reply in cases.items():
        record = send(reply)
        assert not record.completed
        assert record.error.startswith(error), record.error


async def _garbage(writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0\r\n\r\n")


async def _hang_up(writer: asyncio.StreamWriter) -> None:
    writer.write(_HEAD + chunk(b"data: 1\n\n"))
    writer.close()


def test_refused_connection() -> None:
    async def run() -> Record:
        async with Server(_garbage) as url:
            pass
        async with Client([url]) as client:
            return (await open_loop(client, [(0.0, _REQUEST)], timeout_s=1.0))[0]

    assert asyncio.run(run()).error.startswith("cannot connect")


def test_ttft_is_that_of_the_first_body_byte() -> None:
    async def slow(writer: asyncio.StreamWriter) -> None:
        writer.write(_HEAD)
        await asyncio.sleep(0.05)
        writer.write(chunk(b"data: 1\n\n"))
        await asyncio.sleep(0.05)
        writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    record = send(slow)
    assert 0.045 < record.ttft_s < 0.095
    assert record.last_s - record.first_s > 0.045


def test_open_loop_never_waits_for_replies() -> None:
    """Arrivals keep their times before a server that answers nothing."""

    async def silence(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.5)

    async def run() -> tuple[list[Record], Server]:
        server = Server(silence)
        async with server as url, Client([url]) as client:
            arrivals = [(number * 0.01, _REQUEST) for number in range(20)]
            return await open_loop(client, arrivals, timeout_s=0.05), server

    records, server = asyncio.run(run())
    assert server.num_requests == server.num_connections == 20
    assert 0.15 < records[-1].sent_s - records[0].sent_s < 0.30
    assert all(record.error == "not ended after 0.05 s" for record in records)


def test_closed_loop_keeps_its_connections() -> None:
    async def run() -> tuple[list[Record], Server]:
        server = Server(events(b"data: 1\n\n", b"data: [DONE]\n\n"))
        async with server as url, Client([url]) as client:
            await client.connect(4)
            loop = ClosedLoop(client, itertools.repeat(_REQUEST), num_workers=4)
            await loop.start(ramp_s=0.02)
            await asyncio.sleep(0.1)
            records = await loop.stop()
            assert client.num_events == client.num_ended == len(records)
            return records, server

    records, server = asyncio.run(run())
    assert len(records) > 20
    assert all(record.completed for record in records)
    assert server.num_connections == 4


def test_vanishing_breaks_every_connection() -> None:
    async def run() -> None:
        server = Server(events(b"data: 1\n\n", end=b""))
        async with server as url, Client([url]) as client:
            records = [client.send(_REQUEST) for _ in range(50)]
            while not all(record.first_s for record in records):
                await asyncio.sleep(0.005)
            assert client.vanish() == 50
            assert client.num_active == 0
            assert {record.error for record in records} == {"vanished"}
            deadline_s = time.monotonic() + 1
            while server.num_open and time.monotonic() < deadline_s:
                await asyncio.sleep(0.005)
            assert server.num_open == 0

    asyncio.run(run())


def test_several_servers_take_turns() -> None:
    async def run() -> tuple[int, int]:
        reply = events(b"data: [DONE]\n\n")
        first, second = Server(reply), Server(reply)
        async with first as one, second as two, Client([one, two]) as client:
            await open_loop(client, [(0.0, _REQUEST)] * 10, timeout_s=1.0)
        return first.num_requests, second.num_requests

    assert asyncio.run(run()) == (5, 5)


def test_poisson_times_have_their_rate_and_end() -> None:
    offsets_s = list(poisson_offsets_s(20.0, 100.0, random.Random(1)))
    assert offsets_s == sorted(offsets_s)
    assert 0.0 < offsets_s[0] < offsets_s[-1] < 100.0
    assert 1850 < len(offsets_s) < 2150


def test_poisson_times_are_drawn_as_they_are_asked_for() -> None:
    """Other draws between them come from the same generator."""
    rng, expected = random.Random(1), random.Random(1)
    next(poisson_offsets_s(20.0, 100.0, rng))
    expected.expovariate(20.0)
    assert rng.random() == expected.random()
