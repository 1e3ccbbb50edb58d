"""A gateway is killed in the middle of a batch: the next one ends it, each line once."""

import asyncio
import contextlib
import json
import sqlite3
import sys
from collections import Counter
from pathlib import Path

import openai

from serving.stream.server import StreamServer
from tests.serving.gateway.http.endpoints.batch.jobs import answer_with, begin, content, ended, line
from tests.support.fakes import FakeEngine
from tests.support.running_gateway import free_port

SCRIPT = Path(__file__).with_name("gateway_process.py")
NUM_LINES = 500


class SlowEngine(FakeEngine):
    """Takes a moment for each request."""

    async def app(self, scope, receive, send) -> None:
        await asyncio.sleep(0.02)
        await super().app(scope, receive, send)

    @property
    def asked(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.bodies]


@contextlib.asynccontextmanager
async def engine_listening():
    engine = SlowEngine()
    answer_with(engine)
    server = StreamServer(engine, 2**16)
    host, port = await server.listen("127.0.0.1")
    try:
        yield engine, {"r0": {"host": host, "port": port, "secret": server.secret}}
    finally:
        server.close()


@contextlib.asynccontextmanager
async def gateway_process(port: int, folder: Path, members: dict):
    settings = {"gateway": {"port": port}, "batch": {"dir": str(folder), "max_inflight": 10}}
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(SCRIPT), json.dumps(settings), json.dumps(members)
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def answering(client: openai.AsyncOpenAI) -> None:
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(openai.APIConnectionError):
                await client.batches.list()
                return
            await asyncio.sleep(0.05)


def answered_lines(folder: Path) -> set[str]:
    """Return the questions whose answers the killed process had written."""
    with contextlib.closing(sqlite3.connect(folder / "batches.sqlite")) as database:
        rows = database.execute("SELECT body FROM results").fetchall()
    return {json.loads(body)["custom_id"].replace("line-", "question ") for (body,) in rows}


async def test_a_killed_gateway_loses_no_line_and_answers_none_twice(tmp_path):
    port = free_port()
    client = openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0
    )
    async with engine_listening() as (engine, members):
        async with gateway_process(port, tmp_path, members) as process:
            await answering(client)
            batch = await begin(client, [line(number) for number in range(NUM_LINES)])
            async with asyncio.timeout(20):
                while batch.request_counts.completed < 100:
                    await asyncio.sleep(0.02)
                    batch = await client.batches.retrieve(batch.id)
            process.kill()
            await process.wait()
        kept = answered_lines(tmp_path)
        assert 100 <= len(kept) < NUM_LINES - 50  # it was in the middle
        num_before = len(engine.asked)
        async with gateway_process(port, tmp_path, members):
            await answering(client)
            batch = await ended(client, batch)
            assert batch.status == "completed"
            assert batch.request_counts.to_dict() == {
                "total": NUM_LINES,
                "completed": NUM_LINES,
                "failed": 0,
            }
            answers = await content(client, batch.output_file_id)
    assert [each["custom_id"] for each in answers] == [f"line-{n}" for n in range(NUM_LINES)]
    assert not kept & set(engine.asked[num_before:])  # what was answered is not asked again
    times = Counter(Counter(engine.asked).values())
    assert times[1] + times[2] == NUM_LINES
    assert times[2] <= 60  # what was under way, or not yet written
