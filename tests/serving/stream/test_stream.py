"""Both ends of a stream over a real socket: one fake engine, one gateway."""

import asyncio
import contextlib
import os
import socket

import msgspec
import pytest

from router.types import SNAPSHOT_INTERVAL_S
from serving.stream import strangers
from serving.stream.client import StreamClient
from serving.stream.frames import Ack, Alive, Cancel, Data, End, Head, Hello, Submit, encode
from serving.stream.server import HEARTBEAT_S, StreamServer
from tests.support.fakes import INFO, FakeEngine

WINDOW_BYTES = 1000


class Recorder:
    """Keep what a client tells."""

    def __init__(self) -> None:
        self.frames: list = []
        self.updates: list = []
        self.snapshots: list = []
        self.signs: list = []
        self.info = None
        self.lost = False
        self.is_told = False  # something that has come
        self.changed = asyncio.Event()

    def on_received(self, client):
        assert not self.is_told
        self.is_told = True

    def on_all_told(self, client):
        assert self.is_told
        self.is_told = False

    def on_welcome(self, client, info):
        assert self.is_told
        self.info = info
        self.changed.set()

    def on_snapshot(self, client, snapshot):
        self.snapshots.append(snapshot)
        self.changed.set()

    def on_head(self, client, frame):
        self.frames.append(frame)
        self.changed.set()

    on_data = on_end = on_prompt = on_head

    def on_blocks(self, client, update):
        self.updates.append(update)
        self.changed.set()

    def on_alive(self, client, frame):
        self.signs.append(frame)
        self.changed.set()

    def on_lost(self, client):
        self.lost = True
        self.changed.set()

    async def until(self, condition, timeout_s: float = 5.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    def ends(self) -> list[End]:
        return [frame for frame in self.frames if isinstance(frame, End)]

    def num_bytes(self, stream: int) -> int:
        return sum(len(f.body) for f in self.frames if isinstance(f, Data) and f.stream == stream)


class FakeLifeline:
    """Another process, as far as it goes: it has sockets that our event loop knows nothing of."""

    pid = 0

    def __init__(self) -> None:
        self.sockets: list[socket.socket] = []
        self.num_beats = 0

    def carry(self, connection: int) -> None:
        self.sockets.append(socket.socket(fileno=os.dup(connection)))

    def beat(self) -> None:
        self.num_beats += 1


@contextlib.asynccontextmanager
async def connected(lifeline: FakeLifeline | None = None):
    engine = FakeEngine()
    engine.lifeline = lifeline
    server = StreamServer(engine, WINDOW_BYTES)
    host, number = await server.listen("127.0.0.1")
    recorder = Recorder()
    metadata = {"host": host, "port": number, "secret": server.secret}
    client = await StreamClient.connect("r0", metadata, recorder)
    await recorder.until(lambda: recorder.info)
    try:
        yield engine, server, client, recorder
    finally:
        engine.gate.set()
        client.close()
        server.close()


def submit(stream: int, num_chunks: int) -> Submit:
    body = b'{"max_tokens": %d}' % num_chunks
    return Submit(stream, f"id{stream}", 5, 0, 0, "POST", "/v1/completions", [], body)


async def test_a_response_arrives_whole_and_ends_once():
    async with connected() as (_, server, client, recorder):
        # Where it runs, and how often it is heard of, are the server's to tell.
        told = {"heartbeat_s": HEARTBEAT_S, "pid": os.getpid()}
        assert recorder.info == msgspec.structs.replace(INFO, **told)
        client.post(submit(1, num_chunks=3))
        await recorder.until(recorder.ends)
        assert [type(frame) for frame in recorder.frames] == [Head, *[Data] * 4, End]
        assert recorder.ends() == [End(1, None, None)]
        assert server.num_streams == 0


async def test_a_snapshot_acknowledges_the_bookings_read_before_it():
    async with connected() as (engine, _, client, recorder):
        engine.gate.clear()
        client.post(submit(7, num_chunks=1))
        await recorder.until(lambda: recorder.snapshots[-1].last_booking == 7)
        assert recorder.snapshots[-1].num_inflight_reqs == 1
        engine.gate.set()
        await recorder.until(lambda: recorder.snapshots[-1].num_inflight_reqs == 0)
        numbers = [snapshot.seq for snapshot in recorder.snapshots]
        assert numbers == sorted(set(numbers))


async def test_adapters_are_told_of_only_when_they_have_changed():
    async with connected() as (engine, server, _, recorder):
        engine.adapter_paths = {"a": "/a"}
        for paths in ({"a": "/a"}, {}):
            engine.adapter_paths = paths
            for _ in range(3):
                count = len(recorder.snapshots)
                server._push_snapshots()
                await recorder.until(lambda count=count: len(recorder.snapshots) > count)
        told = [each.adapter_paths for each in recorder.snapshots if each.adapter_paths is not None]
        assert told == [{"a": "/a"}, {}]


async def test_a_slow_reader_stops_its_own_stream_and_no_other():
    """Past the window a stream waits for acknowledgements; others go on."""
    async with connected() as (engine, _, client, recorder):
        engine.chunk = b"x" * 400
        client.post(submit(1, num_chunks=100))
        await recorder.until(lambda: recorder.num_bytes(1) >= WINDOW_BYTES)
        client.post(submit(2, num_chunks=2))
        await recorder.until(recorder.ends)
        assert recorder.ends() == [End(2, None, None)]
        assert recorder.num_bytes(1) == 1200  # the chunk that crosses the line is the last
        client.post(Ack(1, 100_000))
        await recorder.until(lambda: len(recorder.ends()) == 2)
        assert recorder.num_bytes(1) == 40_000 + len(b"data: [DONE]\n\n")


async def test_cancel_reaches_the_engine():
    async with connected() as (engine, server, client, recorder):
        engine.gate.clear()
        client.post(submit(1, num_chunks=1))
        await recorder.until(lambda: recorder.snapshots[-1].last_booking == 1)
        client.post(Cancel(1))
        await recorder.until(recorder.ends)
        assert engine.num_cancelled == 1
        assert server.num_streams == 0


async def test_a_lost_gateway_frees_its_streams():
    async with connected() as (engine, server, client, recorder):
        engine.gate.clear()
        client.post(submit(1, num_chunks=1))
        await recorder.until(lambda: recorder.snapshots[-1].last_booking == 1)
        client.close()
        async with asyncio.timeout(5):
            while server.num_streams:
                await asyncio.sleep(0.01)
        assert engine.num_cancelled == 1


async def test_a_stranger_is_turned_away():
    """Only those whom Ray told the secret may submit."""
    async with connected() as (engine, server, _, _):
        stranger = Recorder()
        host, number = server._server.sockets[0].getsockname()
        metadata = {"host": host, "port": number, "secret": "guess"}
        client = await StreamClient.connect("r0", metadata, stranger)
        client.post(submit(1, num_chunks=1))
        await stranger.until(lambda: stranger.lost)
        assert stranger.info is None
        assert engine.num_started == 0


async def stranger(server: StreamServer, port: int) -> tuple:
    """A connection to one of its ports, over which nothing was said yet."""
    host = server._server.sockets[0].getsockname()[0]
    return await asyncio.open_connection(host, port)


def port_of(server: StreamServer) -> int:
    return server._server.sockets[0].getsockname()[1]


async def is_closed(reader: asyncio.StreamReader, timeout_s: float = 2.0) -> bool:
    """Whether the other side hangs up within so long."""
    try:
        return not await asyncio.wait_for(reader.read(), timeout_s)
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


@pytest.mark.parametrize("which", ["stream", "life"])
async def test_a_stranger_gets_four_kilobytes_and_five_seconds(which, monkeypatch):
    monkeypatch.setattr(strangers, "HELLO_TIMEOUT_S", 0.2)
    async with connected(FakeLifeline()) as (_, server, client, recorder):
        port = port_of(server) if which == "stream" else server.life_port.port
        reader, writer = await stranger(server, port)
        assert await is_closed(reader)  # it says nothing
        reader, writer = await stranger(server, port)
        writer.write((4097).to_bytes(4, "big"))
        assert await is_closed(reader, 0.1)
        reader, writer = await stranger(server, port)
        writer.write(encode([Submit(1, "a", 0, 0, 0, "POST", "/", [], b"")]))
        assert await is_closed(reader, 0.1)
        assert server.strangers == server.life_port._strangers == set()
        # A gateway may take its time, and say a lot.
        await asyncio.sleep(0.3)
        client.post(submit(1, num_chunks=1))
        client.post(Submit(2, "a", 0, 0, 0, "POST", "/", [], b"{%s}" % (b" " * 8192)))
        await recorder.until(lambda: len(recorder.ends()) == 2)


async def test_there_may_be_so_many_strangers_and_no_more(monkeypatch):
    monkeypatch.setattr(strangers, "MAX_STRANGERS", 3)
    async with connected() as (_, server, _, _):
        first = [await stranger(server, port_of(server)) for _ in range(3)]
        reader, _ = await stranger(server, port_of(server))
        assert await is_closed(reader)
        assert len(server.strangers) == 3
        for _, writer in first:
            writer.close()
        async with asyncio.timeout(2):
            while server.strangers:
                await asyncio.sleep(0.01)
        recorder = Recorder()
        metadata = {"host": "127.0.0.1", "port": port_of(server), "secret": server.secret}
        client = await StreamClient.connect("r1", metadata, recorder)
        await recorder.until(lambda: recorder.info)
        client.close()


async def test_what_computes_speaks_for_itself():
    """On a connection that the replica has handed on: its own end may well be closed."""
    lifeline = FakeLifeline()
    async with connected(lifeline) as (_, server, client, recorder):
        async with asyncio.timeout(5):
            while not lifeline.sockets:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)  # for our own end to be closed
        [sock] = lifeline.sockets
        sock.send(encode([Alive(7, 1)]))
        await recorder.until(lambda: recorder.signs)
        assert recorder.signs == [Alive(7, 1)]
        assert server.life_port.tokens == set()
        num_beats = lifeline.num_beats
        await asyncio.sleep(0.6)
        assert lifeline.num_beats >= num_beats + 2
        client.close()
        sock.setblocking(True)
        assert await asyncio.wait_for(asyncio.to_thread(sock.recv, 1), 2) == b""
        sock.close()


async def test_a_token_is_good_once():
    lifeline = FakeLifeline()
    async with connected(lifeline) as (_, server, _, _):
        token = server.life_port.issue_token()
        for is_first in (True, False):
            reader, writer = await stranger(server, server.life_port.port)
            writer.write(encode([Hello(token)]))
            await asyncio.sleep(0.1)
            assert len(lifeline.sockets) == 2  # with that of the gateway
            assert await is_closed(reader, 0.2) is not is_first


async def test_an_idle_engine_sends_heartbeats():
    async with connected() as (_, _, _, recorder):
        count = len(recorder.snapshots)
        await recorder.until(lambda: len(recorder.snapshots) >= count + 2, timeout_s=3)


async def test_snapshots_are_pushed_at_once_where_they_are_all_but_due():
    async with connected() as (engine, server, client, recorder):
        engine.gate.clear()
        client.post(submit(1, num_chunks=1))
        await recorder.until(lambda: server.accountings)
        num_before = len(recorder.snapshots)
        for _ in range(3):  # steps that follow each other
            server._last_push_s = asyncio.get_running_loop().time() - SNAPSHOT_INTERVAL_S + 1e-4
            server.on_step()
        await recorder.until(lambda: len(recorder.snapshots) > num_before)


async def test_a_crash_in_the_engines_app_ends_the_stream_with_an_error():
    async with connected() as (engine, _, client, recorder):

        async def broken(scope, receive, send):
            raise RuntimeError("boom")

        engine.app = broken
        client.post(submit(1, num_chunks=1))
        await recorder.until(recorder.ends)
        assert "boom" in recorder.ends()[0].error


async def test_a_crash_behind_a_whole_reply_changes_nothing():
    """Starlette answers an unexpected exception with 500, and raises it once more."""
    async with connected() as (engine, _, client, recorder):

        async def broken(scope, receive, send):
            await send({"type": "http.response.start", "status": 500, "headers": []})
            await send({"type": "http.response.body", "body": b"sorry"})
            raise RuntimeError("boom")

        engine.app = broken
        client.post(submit(1, num_chunks=1))
        await recorder.until(recorder.ends)
        assert [end.error for end in recorder.ends()] == [None]


async def reply_of(app) -> list:
    """The frames that an application's answer becomes."""
    async with connected() as (engine, server, client, recorder):
        engine.app = app
        client.post(submit(1, num_chunks=1))
        await recorder.until(recorder.ends)
        assert server.num_streams == 0
        return recorder.frames


def streaming(*events: bytes):
    """An application that streams these events, and says that it is done, under status 200."""

    async def app(scope, receive, send):
        headers = [(b"content-type", b"text/event-stream"), (b"x-a", b"b")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for event in (*events, b"data: [DONE]\n\n"):
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


REFUSAL = b'{"error": {"message": "no", "type": "BadRequestError", "param": null, "code": 400}}'


async def test_a_stream_that_begins_with_an_error_is_that_error():
    """vLLM has sent 200 when it finds out."""
    head, data, end = await reply_of(streaming(b"data: " + REFUSAL + b"\n\n"))
    assert (head.status, dict(head.headers)) == (
        400,
        {b"content-type": b"application/json", b"x-a": b"b"},
    )
    assert data.body == REFUSAL
    assert end == End(1, None, None)


async def test_an_error_in_the_middle_of_a_stream_stays_where_it_is():
    events = [b'data: {"choices": []}\n\n', b"data: " + REFUSAL + b"\n\n"]
    head, *data, end = await reply_of(streaming(*events))
    assert head.status == 200
    assert [frame.body for frame in data] == [*events, b"data: [DONE]\n\n"]
    assert end == End(1, None, None)


@pytest.mark.parametrize(
    "event",
    [b'data: {"error": "no"}', b'data: {"error": {"code": 200}}', b'data: {"error": {}}'],
)
async def test_what_only_looks_like_an_error_is_passed_on(event):
    head, data, *_ = await reply_of(streaming(event + b"\n\n"))
    assert (head.status, data.body) == (200, event + b"\n\n")
