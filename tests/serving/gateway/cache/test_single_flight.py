"""Equal requests under way at the same time, over real HTTP: one generation serves them all."""

import asyncio

import msgspec
import pytest

from tests.serving.gateway.cache.asking import ON, ask, num_started
from tests.support.running_gateway import CHAT, running


async def raw_post(port: int, path: str, body: bytes) -> bytes:
    """The whole reply, head and all; httpx takes half a minute to open 1,000 connections."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}"
    writer.write(head.encode() + b"\r\n\r\n" + body)
    reply = await reader.read()
    while piece := await reader.read():
        reply += piece
    writer.close()
    return reply


async def test_a_thousand_at_once_cost_one_generation():
    async with running(cache=ON) as system:
        for engine in system.engines:
            engine.gate.clear()
        body = msgspec.json.encode(system.chat(temperature=0, max_tokens=20))
        port = system.gateway.config.gateway.port
        asking = [asyncio.create_task(raw_post(port, CHAT, body)) for _ in range(1000)]
        await system.until(lambda: system.gateway.cache.num_by_verdict["join"] == 999, timeout_s=30)
        for engine in system.engines:
            engine.gate.set()
        replies = await asyncio.gather(*asking)
        assert num_started(system) == 1
        assert {reply.count(b"data: {}") for reply in replies} == {20}
        assert all(b"data: [DONE]\n\n" in reply for reply in replies)
        assert sum(b"x-headway-cache: join" in reply for reply in replies) == 999
        system.assert_empty()
        state = system.gateway.cache.state()
        assert (state.num_flights, state.num_flight_bytes) == (0, 0)


@pytest.mark.parametrize("leader_leaves", [True, False])
async def test_who_leaves_takes_nobody_along(leader_leaves):
    async with running(cache=ON) as system:
        for engine in system.engines:
            engine.gate.clear()
        leader = asyncio.create_task(ask(system))
        await system.until(lambda: system.num_engine_streams == 1)
        joiner = asyncio.create_task(ask(system))
        await system.until(lambda: system.gateway.cache.num_by_verdict["join"] == 1)
        leaving, staying = (leader, joiner) if leader_leaves else (joiner, leader)
        leaving.cancel()
        await asyncio.sleep(0.1)
        for engine in system.engines:
            engine.gate.set()
        assert (await staying).text.count("data: {}") == 5
        assert (await ask(system)).headers["x-headway-cache"] == "hit"
        assert num_started(system) == 1
        system.assert_empty()


async def test_when_the_last_leaves_the_generation_ends():
    async with running(cache=ON) as system:
        for engine in system.engines:
            engine.gate.clear()
        asking = [asyncio.create_task(ask(system)) for _ in range(3)]
        await system.until(lambda: system.gateway.cache.num_by_verdict["join"] == 2)
        await system.until(lambda: system.num_engine_streams == 1)
        for task in asking:
            task.cancel()
        await system.until(lambda: system.num_engine_streams == 0, timeout_s=1)
        for engine in system.engines:
            engine.gate.set()
        assert (await ask(system)).headers["x-headway-cache"] == "miss"
        system.assert_empty()
        assert system.gateway.cache.state().num_flight_bytes == 0


async def test_who_is_in_a_hurry_does_not_join_batch_work():
    async with running(cache=ON) as system:
        for engine in system.engines:
            engine.gate.clear()
        classes = ("batch", "interactive", "batch")
        asking = []
        for name in classes:
            asking.append(asyncio.create_task(ask(system, priority_class=name)))
            await asyncio.sleep(0.05)
        for engine in system.engines:
            engine.gate.set()
        verdicts = [(await task).headers["x-headway-cache"] for task in asking]
        assert verdicts == ["miss", "miss", "join"]


async def test_past_the_bound_of_one_response_readers_are_served_in_step():
    """Too large to keep: still whole for those who joined, however slowly one of them reads."""
    cache = {**ON, "max_entry_bytes": 100_000}
    async with running(num_engines=1, cache=cache) as system:
        engine = system.engines[0]
        engine.chunk = b"data: " + b"x" * 1000 + b"\n\n"
        engine.gate.clear()
        body = system.chat(temperature=0, max_tokens=20_000)
        request = system.client.build_request("POST", CHAT, json=body)
        asking = asyncio.create_task(system.client.send(request, stream=True))
        await system.until(lambda: system.num_engine_streams == 1)
        quick = asyncio.create_task(system.client.post(CHAT, json=body))
        await system.until(lambda: system.gateway.cache.num_by_verdict["join"] == 1)
        engine.gate.set()
        slow = await asking
        await asyncio.sleep(0.3)  # it reads nothing meanwhile
        (flight,) = system.gateway.cache._flights.values()
        assert not flight.is_whole
        assert sum(map(len, flight._chunks)) <= 100_000 + 64 * 1024 + 2000
        num_bytes = sum([len(piece) async for piece in slow.aiter_raw()])
        assert num_bytes == len((await quick).content) == 20_000 * 1008 + len(b"data: [DONE]\n\n")
        assert system.gateway.cache.state().num_stored == 0
        system.assert_empty()
