"""Our own code fails under one request: that one ends, nothing of it stays, nobody else notices."""

import asyncio

import pytest

from tests.support.running_gateway import CHAT, running


def fails_for_poison(function):
    """Raise where the request is the poison, do as before elsewhere."""

    def wrapped(request, *args, **kwargs):
        request_id = getattr(request, "id", request)
        if request_id in wrapped.poisons:
            raise OverflowError("int too large to convert to float")
        return function(request, *args, **kwargs)

    wrapped.poisons = set()
    return wrapped


@pytest.mark.parametrize(
    ("event", "status"), [("on_answer", 500), ("on_first_token", 500), ("on_finish", 200)]
)
async def test_a_router_that_raises_under_a_reply_ends_that_reply_alone(monkeypatch, event, status):
    async with running(num_engines=1) as system:
        system.engines[0].gate.clear()
        router = system.gateway.router
        guarded = fails_for_poison(getattr(router, event))
        monkeypatch.setattr(router, event, guarded)
        good = asyncio.create_task(system.client.post(CHAT, json=system.chat(max_tokens=3)))
        await system.until(lambda: system.num_engine_streams == 1)
        known = set(system.gateway.driver.exchanges)
        bad = asyncio.create_task(system.client.post(CHAT, json=system.chat(max_tokens=5)))
        await system.until(lambda: system.num_engine_streams == 2)
        guarded.poisons |= system.gateway.driver.exchanges.keys() - known
        system.engines[0].gate.set()
        assert (await good).text.count("data: {}") == 3
        assert (await bad).status_code == status
        await system.until(lambda: not system.num_engine_streams)
        system.assert_empty()
        assert system.gateway.driver.records.num_bytes == 0
        assert system.gateway.state().breaker_events == []  # the connection is as it was


async def test_a_router_that_raises_at_the_arrival_leaves_nothing_behind(monkeypatch):
    async with running() as system:
        router = system.gateway.router
        monkeypatch.setattr(router, "on_arrival", lambda *_: 1 / 0)
        for _ in range(10):
            reply = await system.client.post(CHAT, json=system.chat())
            assert reply.status_code == 500
        monkeypatch.undo()
        assert (await system.client.post(CHAT, json=system.chat())).status_code == 200
        system.assert_empty()
