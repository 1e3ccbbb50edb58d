"""What a replica sends of a response, and when."""

import asyncio

import pytest
from starlette.types import Receive, Scope, Send

from serving.stream.frames import Data, End, Head, Submit
from tests.serving.stream.test_stream import connected, submit

CREATED = b'event: response.created\ndata: {"type":"response.created"}\n\n'
PROGRESS = b'event: response.in_progress\ndata: {"type":"response.in_progress"}\n\n'
DELTA = b'event: response.output_text.delta\ndata: {"delta":"a"}\n\n'
ERROR = b'data: {"error":{"message":"no","type":"T","code":400}}\n\n'


class Script:
    """Sends these chunks, each when told to."""

    def __init__(self, *chunks: bytes) -> None:
        self.chunks = chunks
        self.scopes: list[Scope] = []
        self.turns: asyncio.Queue[None] = asyncio.Queue()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for chunk in self.chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await self.turns.get()
        await send({"type": "http.response.body", "body": b""})

    def go_on(self) -> None:
        self.turns.put_nowait(None)


async def test_what_precedes_the_first_token_leaves_with_it():
    async with connected() as (engine, _, client, recorder):
        engine.app = script = Script(CREATED, PROGRESS, DELTA)
        client.post(submit(1, 1))
        for _ in range(2):
            script.go_on()
        await recorder.until(lambda: recorder.num_bytes(1))
        assert [type(frame) for frame in recorder.frames] == [Head, Data]
        assert recorder.frames[1].body == CREATED + PROGRESS + DELTA
        script.go_on()
        await recorder.until(recorder.ends)


async def test_before_its_first_token_nothing_has_begun():
    async with connected() as (engine, server, client, recorder):
        engine.app = Script(CREATED)
        client.post(submit(1, 1))
        await recorder.until(lambda: server.num_streams == 1)
        await asyncio.sleep(0.05)
        assert recorder.frames == []


async def test_what_runs_in_the_background_tells_so_at_once():
    async with connected() as (engine, _, client, recorder):
        begun = CREATED.replace(b"}", b',"response":{"background":true}}')
        engine.app = Script(begun)
        client.post(submit(1, 1))
        await recorder.until(lambda: recorder.num_bytes(1) == len(begun))


async def test_an_error_in_place_of_the_first_token_has_its_own_status():
    async with connected() as (engine, _, client, recorder):
        engine.app = script = Script(CREATED, ERROR)
        client.post(submit(1, 1))
        for _ in range(2):
            script.go_on()
        await recorder.until(recorder.ends)
        head, data, _ = recorder.frames
        assert head.status == 400
        assert data.body == ERROR[6:-2]


@pytest.mark.parametrize("path", ["/v1/responses/a?stream=true", "/version"])
async def test_a_question_is_in_no_snapshot(path):
    async with connected() as (engine, server, client, recorder):
        engine.app = script = Script(b"{}")
        client.post(Submit(-1, "q", 0, 0, 0, "GET", path, [], b""))
        await recorder.until(lambda: recorder.num_bytes(-1))
        assert not server.accountings
        [scope] = script.scopes
        told = (scope["path"], scope["query_string"].decode())
        assert told == path.partition("?")[::2]
        script.go_on()
        await recorder.until(recorder.ends)
        assert isinstance(recorder.frames[-1], End)
        assert all(snapshot.last_booking == 0 for snapshot in recorder.snapshots)
        assert all(snapshot.num_inflight_reqs == 0 for snapshot in recorder.snapshots)
