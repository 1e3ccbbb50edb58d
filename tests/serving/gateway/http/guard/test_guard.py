"""Clients that hold connections and give nothing for it."""

import asyncio
import json

import pytest

from tests.support.running_gateway import CHAT, System, running

SHORT = {"head_timeout_s": 0.2, "body_timeout_s": 0.2, "stall_timeout_s": 0.2}
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"


async def connect(system: System):
    return await asyncio.open_connection("127.0.0.1", system.gateway.config.gateway.port)


async def is_closed(reader: asyncio.StreamReader) -> bool:
    """Whether the connection ends within a second, without a word."""
    async with asyncio.timeout(1.0):
        return await reader.read() == b""


@pytest.mark.parametrize(
    "begun", [b"", HEAD, HEAD + b"content-length: 100\r\n\r\n" + b"{"], ids=["idle", "head", "body"]
)
async def test_a_request_that_does_not_come_is_cut(begun):
    async with running(gateway=SHORT) as system:
        reader, writer = await connect(system)
        writer.write(begun)
        assert await is_closed(reader)
        writer.close()
        system.assert_empty()


async def test_many_idle_connections_do_not_keep_others_out():
    async with running(gateway=SHORT | {"head_timeout_s": 2.0}) as system:
        idle = [await connect(system) for _ in range(500)]
        assert (await system.client.post(CHAT, json=system.chat())).status_code == 200
        for _, writer in idle:
            writer.close()


async def test_beyond_the_bound_of_connections_requests_are_refused():
    async with running(gateway={"max_connections": 5}) as system:
        idle = [await connect(system) for _ in range(10)]
        await asyncio.sleep(0.05)
        assert (await system.client.post(CHAT, json=system.chat())).status_code == 503
        for _, writer in idle:
            writer.close()


async def test_a_head_without_end_is_refused():
    async with running(gateway={"max_head_bytes": 10_000}) as system:
        reader, writer = await connect(system)
        writer.write(HEAD)
        for number in range(1000):
            writer.write(b"x-%d: %b\r\n" % (number, b"y" * 1000))
        assert (await reader.readline()).startswith(b"HTTP/1.1 431 ")
        writer.close()


async def test_a_second_request_on_a_connection_has_as_little_time():
    async with running(gateway=SHORT) as system:
        reader, writer = await connect(system)
        body = json.dumps(system.chat(stream=False)).encode()
        writer.write(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        await reader.readuntil(b"[DONE]")
        await asyncio.sleep(0.4)  # idle between requests: uvicorn's own, longer timeout
        writer.write(HEAD)
        async with asyncio.timeout(1.0):
            await reader.read()
        writer.close()


async def test_a_client_that_does_not_read_is_cut_and_its_engine_freed():
    async with running(gateway=SHORT) as system:
        for engine in system.engines:
            engine.chunk = b"x" * 100_000
        reader, writer = await connect(system)
        body = json.dumps(system.chat(max_tokens=4_000)).encode()
        writer.write(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        await reader.readline()
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        await system.until(lambda: system.num_engine_streams == 1)
        await system.until(lambda: system.outcomes["reneged"] == 1)
        await system.until(lambda: system.num_engine_streams == 0)
        system.assert_empty()
        writer.close()


async def test_bodies_on_their_way_are_bounded_together():
    limits = {"max_incoming_bytes": 10_000, "body_timeout_s": 0.5}
    async with running(gateway=limits) as system:
        halves = []
        for _ in range(2):
            _, writer = await connect(system)
            writer.write(HEAD + b"content-length: 10000\r\n\r\n" + b" " * 5000)
            halves.append(writer)
        await system.until(lambda: system.gateway.body_reader.num_bytes == 10_000)
        refused = await system.client.post(CHAT, json=system.chat())
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "too_many_bodies"
        assert int(refused.headers["retry-after"]) >= 1
        await system.until(lambda: system.gateway.body_reader.num_bytes == 0)  # they are cut
        assert (await system.client.post(CHAT, json=system.chat())).status_code == 200
        for writer in halves:
            writer.close()
