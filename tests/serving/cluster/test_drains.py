"""Who leaves lets its streams end: an engine's replica, and a gateway. Within a limit."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import httpx
import pytest

from serving.cluster.application import _close_gateway
from serving.cluster.engine_deployment import _stop_server
from serving.config import parse
from serving.gateway.app import Gateway
from serving.gateway.http.listener import Listener
from tests.support.running_gateway import CHAT, System, free_port, running

WHOLE = "data: {}\n\n" * 3 + "data: [DONE]\n\n"


async def streaming(system: System) -> asyncio.Task[httpx.Response]:
    """A stream of three events, the first of which is on its way, and the others are not."""
    for engine in system.engines:
        engine.closes_at = 1
    reply = asyncio.create_task(system.client.post(CHAT, json=system.chat(max_tokens=3)))
    await system.until(lambda: sum(engine.num_steps for engine in system.engines) == 1)
    return reply


async def expect_a_drain(
    leave: Callable[[float], Awaitable[None]], system: System, reply: asyncio.Task[httpx.Response]
) -> None:
    """Leaving waits for the stream, which is whole, and no longer than for that."""
    leaving = asyncio.create_task(leave(5.0))
    await asyncio.sleep(0.3)
    assert not leaving.done()
    assert not reply.done()
    start_s = time.monotonic()
    for engine in system.engines:
        engine.gate.set()
    assert (await reply).text == WHOLE
    await leaving
    assert time.monotonic() - start_s < 2.0


async def expect_a_limit(leave: Callable[[float], Awaitable[None]]) -> None:
    """Leaving ends in time though the stream does not."""
    loop = asyncio.get_running_loop()  # whose clock counts whole milliseconds
    start_s = loop.time()
    await leave(0.4)
    assert start_s + 0.4 <= loop.time() < start_s + 2.0


async def test_an_engine_that_leaves_lets_its_streams_end() -> None:
    async with running(num_engines=1) as system:
        reply = await streaming(system)
        [server] = system.servers
        await expect_a_drain(lambda limit_s: _stop_server(server, limit_s), system, reply)
        assert system.engines[0].dead
        assert system.outcomes["completed"] == 1


async def test_an_engine_leaves_in_time_all_the_same() -> None:
    async with running(num_engines=1) as system:
        reply = await streaming(system)
        [server] = system.servers
        await expect_a_limit(lambda limit_s: _stop_server(server, limit_s))
        await system.until(lambda: server.num_streams == 0)
        assert system.engines[0].dead
        reply.cancel()


async def test_an_engine_that_is_not_named_any_more_ends_its_streams() -> None:
    """The gateway closes its connection after the last of them, and not before."""
    async with running(num_engines=1) as system:
        reply = await streaming(system)
        system.gateway.driver.engines.set_members({})
        await asyncio.sleep(0.3)
        assert system.gateway.driver.engines.infos
        assert not reply.done()
        system.engines[0].gate.set()
        assert (await reply).text == WHOLE
        await system.until(lambda: not system.gateway.driver.engines.infos)


@pytest.fixture
async def leaving_gateway():
    """A system whose gateway and listener are the test's to close."""
    config = parse({"gateway": {"port": free_port()}})
    gateway = Gateway(config, "gateway")
    listener = Listener(gateway.app, config.gateway)
    await listener.start()
    url = f"http://127.0.0.1:{config.gateway.port}"
    async with httpx.AsyncClient(base_url=url, timeout=10) as client:
        system = System(gateway, client)
        await system.add_engine()
        yield system, lambda limit_s: _close_gateway(gateway, [listener], limit_s)
        for server in system.servers:
            server.close()


async def test_a_gateway_that_leaves_lets_its_streams_end(leaving_gateway) -> None:
    system, leave = leaving_gateway
    reply = await streaming(system)
    await expect_a_drain(leave, system, reply)
    assert system.outcomes["completed"] == 1


async def test_a_gateway_leaves_in_time_all_the_same(leaving_gateway) -> None:
    system, leave = leaving_gateway
    reply = await streaming(system)
    await expect_a_limit(leave)
    await system.until(lambda: system.num_engine_streams == 0)
    assert '"error"' in (await reply).text
    assert "[DONE]" not in (await reply).text
