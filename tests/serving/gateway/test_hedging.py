"""A second engine for a late first token, over real connections: the client sees one reply."""

import asyncio

import pytest

from router.scheduling.hedging import HedgingState
from tests.support.running_gateway import CHAT, System, running

HEDGE = {"router": {"hedge_factor": 2.0}}


def hedges(system: System) -> HedgingState:
    return system.gateway.state().hedges


async def both_asked(system: System, **fields) -> tuple[asyncio.Task, int]:
    """A request that two engines have, which both stand still; and who was asked first."""
    for engine in system.engines:
        engine.gate.clear()
    body = system.chat(**fields)
    task = asyncio.create_task(system.client.post(CHAT, json=body))
    await system.until(lambda: system.num_engine_streams == 1)
    (first,) = (i for i, server in enumerate(system.servers) if server.num_streams)
    await system.until(lambda: system.num_engine_streams == 2)
    return task, first


@pytest.mark.parametrize("winner", ["first", "second"])
@pytest.mark.parametrize("is_streamed", [True, False])
async def test_who_answers_first_has_it_and_the_other_stops(winner, is_streamed):
    async with running(**HEDGE) as system:
        task, first = await both_asked(system, max_tokens=3, stream=is_streamed)
        fast = first if winner == "first" else 1 - first
        system.engines[fast].gate.set()
        reply = await task
        assert reply.status_code == 200
        assert reply.text.count("data: {}") == 3
        slow = system.engines[1 - fast]
        await system.until(lambda: slow.num_cancelled == 1)
        assert hedges(system) == HedgingState(num_open=0, num_made=1, num_won=int(fast != first))
        assert system.outcomes["completed"] == 1
        system.assert_empty()


@pytest.mark.parametrize("lost", ["first", "second"])
async def test_one_of_both_is_lost_and_the_other_answers(lost):
    async with running(**HEDGE) as system:
        task, first = await both_asked(system, max_tokens=3)
        gone = first if lost == "first" else 1 - first
        system.servers[gone].close()
        await system.until(lambda: not hedges(system).num_open)
        system.engines[1 - gone].gate.set()
        reply = await task
        assert reply.text.count("data: {}") == 3
        assert system.outcomes["completed"] == 1
        assert system.gateway.state().retries.num_made == 0
        system.assert_empty()


async def test_an_error_of_the_second_is_nobodys_concern():
    async with running(**HEDGE) as system:
        for engine in system.engines:
            engine.gate.clear()
        task = asyncio.create_task(system.client.post(CHAT, json=system.chat(max_tokens=3)))
        await system.until(lambda: system.num_engine_streams == 1)
        (first,) = (i for i, server in enumerate(system.servers) if server.num_streams)
        system.engines[1 - first].status = 500
        system.engines[1 - first].gate.set()  # an engine's head comes with its body
        await system.until(lambda: hedges(system).num_made and not hedges(system).num_open)
        system.engines[first].gate.set()
        reply = await task
        assert reply.status_code == 200
        assert reply.text.count("data: {}") == 3
        system.assert_empty()


async def test_the_client_leaves_both():
    async with running(**HEDGE) as system:
        task, _ = await both_asked(system)
        task.cancel()
        await system.until(lambda: all(engine.num_cancelled for engine in system.engines))
        assert system.outcomes["reneged"] == 1
        system.assert_empty()


async def test_by_default_there_is_no_second():
    async with running() as system:
        for engine in system.engines:
            engine.gate.clear()
        task = asyncio.create_task(system.client.post(CHAT, json=system.chat(max_tokens=3)))
        await system.until(lambda: system.num_engine_streams == 1)
        await asyncio.sleep(0.3)
        assert system.num_engine_streams == 1
        for engine in system.engines:
            engine.gate.set()
        assert (await task).status_code == 200
        system.assert_empty()
