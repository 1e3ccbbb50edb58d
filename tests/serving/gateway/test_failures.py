"""Engines that fail under requests: what the client sees of it, which should be nothing."""

import asyncio
import contextlib

import pytest

from router.resilience.breaker import TripReason
from router.resilience.suspects import PROVEN_TOKENS
from tests.support.running_gateway import CHAT, System, running

NUMBERED = b"data: %d\n\n"


def whole(num_chunks: int) -> str:
    """The reply of an engine that nothing happens to."""
    return "".join(f"data: {number}\n\n" for number in range(num_chunks)) + "data: [DONE]\n\n"


def stop(system: System) -> None:
    for engine in system.engines:
        engine.gate.clear()


def go_on(system: System) -> None:
    for engine in system.engines:
        engine.gate.set()


def busy_index(system: System) -> int:
    """Which engine has the only stream."""
    (index,) = (i for i, server in enumerate(system.servers) if server.num_streams)
    return index


@contextlib.asynccontextmanager
async def begun(system: System, path: str = CHAT, **fields):
    """A task that reads on a stream whose first bytes are there and whose engine has stopped."""
    for engine in system.engines:
        engine.chunk = NUMBERED
    body = system.chat(max_tokens=8_000, **fields)
    async with system.client.stream("POST", path, json=body) as reply:
        pieces = reply.aiter_text()
        first = ""
        while first.count("data: ") < PROVEN_TOKENS:
            first += await anext(pieces)
        stop(system)

        async def rest() -> str:
            return first + "".join([piece async for piece in pieces])

        yield asyncio.create_task(rest())


async def test_before_the_first_token_another_engine_takes_over():
    async with running(num_engines=3) as system:
        stop(system)
        task = asyncio.create_task(system.client.post(CHAT, json=system.chat(max_tokens=3)))
        await system.until(lambda: system.num_engine_streams == 1)
        system.servers[busy_index(system)].close()
        go_on(system)
        reply = await task
        assert reply.status_code == 200
        assert reply.text.count("data: {}") == 3
        assert system.outcomes["completed"] == 1
        system.assert_empty()


async def test_the_last_engine_is_not_risked_for_who_may_have_ended_the_other():
    async with running() as system:
        stop(system)
        task = asyncio.create_task(system.client.post(CHAT, json=system.chat(max_tokens=3)))
        await system.until(lambda: system.num_engine_streams == 1)
        ended = busy_index(system)
        system.servers[ended].close()
        go_on(system)
        await system.until(lambda: system.gateway.state().held.num_requests == 1)
        reply = await system.client.post(CHAT, json=system.chat(max_tokens=2))
        assert reply.text.count("data: {}") == 2  # others go on
        await asyncio.sleep(0.1)
        assert system.gateway.state().held.num_requests == 1
        await system.add_engine()
        assert (await task).text.count("data: {}") == 3
        assert system.engines[2].num_started == 1
        system.assert_empty()


async def test_who_ends_two_engines_is_refused():
    async with running(num_engines=3) as system:
        stop(system)
        body = system.chat(max_tokens=3, user="poison")
        task = asyncio.create_task(system.client.post(CHAT, json=body))
        await system.until(lambda: system.num_engine_streams == 1)
        first = busy_index(system)
        system.servers[first].close()
        others = {0, 1, 2} - {first}
        await system.until(lambda: any(system.engines[index].num_started for index in others))
        [second] = (index for index in others if system.engines[index].num_started)
        system.servers[second].close()
        await system.until(lambda: not system.gateway.state().num_placed)
        go_on(system)
        for reply in (await task, await system.client.post(CHAT, json=body)):
            assert reply.status_code == 400
            assert reply.json()["error"]["code"] == "ends_engines"
        assert (await system.client.post(CHAT, json=system.chat())).status_code == 200
        assert system.gateway.state().suspects.num_refused == 1
        system.assert_empty()


async def test_after_the_first_token_another_engine_goes_on_where_it_broke_off():
    async with running() as system, begun(system) as text:
        system.servers[busy_index(system)].close()
        go_on(system)
        assert await text == whole(8_000)
        assert system.outcomes["completed"] == 1
        assert system.gateway.state().retries.num_made == 1
        system.assert_empty()


async def test_an_engine_that_dies_says_nothing_about_it_to_the_client():
    """vLLM would send an error event and [DONE] under status 200."""
    async with running() as system, begun(system) as text:
        system.engines[busy_index(system)].dead = True
        go_on(system)
        assert await text == whole(8_000)
        system.assert_empty()


async def test_where_the_replies_differ_the_stream_ends_with_an_error():
    """Visibly incomplete: an error event and no [DONE]."""
    async with running() as system, begun(system) as text:
        index = busy_index(system)
        system.engines[1 - index].chunk = b"data: other %d\n\n"
        system.servers[index].close()
        go_on(system)
        assert '"error"' in await text
        assert "differs from what had been sent" in await text
        assert "[DONE]" not in await text
        assert system.outcomes["failed"] == 1
        system.assert_empty()


async def test_where_the_other_reply_is_shorter_too():
    async with running() as system, begun(system) as text:
        index = busy_index(system)
        system.engines[1 - index].chunk = b""
        system.servers[index].close()
        go_on(system)
        assert "shorter than what had been sent" in await text


async def test_endpoints_that_cannot_go_on_end_with_an_error():
    path, messages = "/v1/chat/completions/batch", [[{"role": "user", "content": "hi"}]]
    async with running() as system, begun(system, path, messages=messages) as text:
        system.servers[busy_index(system)].close()
        assert "[DONE]" not in await text
        assert system.outcomes["failed"] == 1
        system.assert_empty()


async def test_without_another_engine_the_stream_waits_for_one():
    async with running(num_engines=1) as system, begun(system) as text:
        system.servers[0].close()
        await system.until(lambda: system.gateway.state().held.num_requests == 1)
        await system.add_engine(NUMBERED)
        assert await text == whole(8_000)
        system.assert_empty()


async def test_a_hung_engine_is_left():
    """Its heartbeats come, its steps do not."""
    async with running(router={"hang_s": 0.3}) as system, begun(system) as text:
        index = busy_index(system)
        system.engines[1 - index].gate.set()
        assert await text == whole(8_000)
        assert system.gateway.state().replicas[f"r{index}"].breaker.reason is TripReason.HUNG
        go_on(system)
        await system.until(lambda: not system.num_engine_streams)
        system.assert_empty()


async def test_a_reply_that_tells_of_the_engines_trouble_is_asked_for_elsewhere():
    async with running() as system:
        system.engines[0].status = 503
        replies = [await system.client.post(CHAT, json=system.chat()) for _ in range(6)]
        assert {reply.status_code for reply in replies} == {200}
        assert system.engines[0].num_started
        system.assert_empty()


async def test_the_second_engine_that_says_so_is_believed():
    async with running() as system:
        for engine in system.engines:
            engine.status = 500
        reply = await system.client.post(CHAT, json=system.chat())
        assert reply.status_code == 500
        assert reply.text.endswith("[DONE]\n\n")
        assert [engine.num_started for engine in system.engines] == [1, 1]
        system.assert_empty()


@pytest.mark.parametrize("status", [400, 404, 422, 501])
async def test_client_errors_are_passed_on_and_open_nothing(status):
    async with running(router={"breaker": {"max_consecutive_failures": 1}}) as system:
        for engine in system.engines:
            engine.status = status
        for _ in range(5):
            reply = await system.client.post(CHAT, json=system.chat())
            assert reply.status_code == status
        assert system.gateway.state().breaker_events == []
        assert system.gateway.state().retries.num_made == 0


async def test_breakers_and_retries_are_in_the_metrics():
    async with running() as system:
        text = (await system.client.get("/metrics")).text
        assert 'headway_breaker_state{gateway="0",replica="r0",state="closed"} 1.0' in text
        assert 'headway_breaker_state{gateway="0",replica="r0",state="open"} 0.0' in text
        assert 'headway_retry_budget{gateway="0"} 100.0' in text


async def test_a_draining_engine_that_runs_out_of_time_hands_its_streams_over():
    """And nothing counts against it."""
    async with running() as system, begun(system) as text:
        index = busy_index(system)
        del system.members[f"r{index}"]
        system.gateway.driver.engines.set_members(system.members)
        system.servers[index].close()  # its grace time is over
        go_on(system)
        assert await text == whole(8_000)
        assert system.outcomes["completed"] == 1
        assert system.gateway.state().breaker_events == []
        system.assert_empty()


async def test_a_gateway_that_stops_ends_what_is_open():
    """Held, at an engine or at a provider: nothing is sent anywhere once its clients are closed."""
    async with running(router={"max_held_requests": 10}) as system:
        stop(system)
        tasks = [
            asyncio.create_task(system.client.post(CHAT, json=system.chat(max_tokens=3)))
            for _ in range(3)
        ]
        await system.until(lambda: len(system.gateway.driver.exchanges) == 3)
        system.gateway.close()
        replies = await asyncio.gather(*tasks)
        assert {reply.status_code for reply in replies} == {502}
        assert all("the gateway stops" in reply.text for reply in replies)
        await system.until(lambda: not system.gateway.driver.engines.infos)
        assert system.outcomes["reneged"] == 3
