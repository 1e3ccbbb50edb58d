"""A gateway before engines of several models: each has its own, and one can be removed."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator

import msgspec

from serving.gateway.intake.served_models import ModelEntry
from tests.support.fakes import INFO, FakeEngine
from tests.support.running_gateway import CHAT, System, running

# One request at a time, so that a second one is held.
SMALL = msgspec.structs.replace(INFO, max_num_seqs=1)
A = ModelEntry(deployment="Engine-a", names=("a", "alias"))
B = ModelEntry(deployment="Engine-b", names=("b",))


@contextlib.asynccontextmanager
async def two_models() -> AsyncIterator[tuple[System, FakeEngine, FakeEngine]]:
    """Models b and a, in the configuration's order, with an engine each."""
    async with running(num_engines=0, served_names=("b", "a", "alias")) as system:
        system.gateway.use_models([B, A])
        info = msgspec.structs.replace(SMALL, model="a", aliases=("alias",))
        a = await system.add_engine(info=info)
        b = await system.add_engine(info=msgspec.structs.replace(SMALL, model="b"))
        yield system, a, b


async def ask(system: System, model: str, num_tokens: int = 2) -> int:
    body = system.chat(model=model, max_tokens=num_tokens)
    return (await system.client.post(CHAT, json=body)).status_code


async def test_requests_go_to_their_models_engine_by_every_name():
    async with two_models() as (system, a, b):
        assert [await ask(system, name) for name in ("a", "alias", "b", "a")] == [200] * 4
        assert (a.num_started, b.num_started) == (3, 1)
        assert await ask(system, "c") == 404
        listed = (await system.client.get("/v1/models")).json()["data"]
        assert [card["id"] for card in listed] == ["b", "a", "alias"]
        assert await ask(system, "") == 200  # none: the first of the configuration
        assert b.num_started == 2
        system.assert_empty()


async def test_what_waits_for_one_model_keeps_nobody_from_another():
    async with two_models() as (system, a, _b):
        a.gate.clear()
        waiting = [asyncio.create_task(ask(system, "a")) for _ in range(5)]
        await system.until(lambda: system.gateway.state().held.num_requests == 4)
        held = system.gateway.state().held
        assert held.num_tokens_by_model == {"a": held.num_tokens}
        metrics = (await system.client.get("/metrics")).text
        assert re.search(r'headway_model_held_prompt_tokens{[^}]*model="a"} [1-9]', metrics)
        for _ in range(10):
            assert await asyncio.wait_for(ask(system, "b"), 1.0) == 200
        assert system.gateway.state().held.num_requests == 4
        a.gate.set()
        assert await asyncio.gather(*waiting) == [200] * 5
        text = (await system.client.get("/metrics")).text
        done = re.findall(r'headway_requests_total\{(.*outcome="completed".*)\} (\S+)', text)
        numbers = {re.search(r'model="(\w+)"', labels)[1]: float(n) for labels, n in done}
        assert numbers == {"a": 5.0, "b": 10.0}
        accuracies = system.gateway.state().accuracy_by_model
        assert {name: each.ttft.num_compared for name, each in accuracies.items()} == numbers
        system.assert_empty()


async def test_a_removed_model_is_unknown_and_drops_nothing():
    """What runs and what is held is answered by the engine that Ray stops; nothing new comes."""
    async with two_models() as (system, a, _b):
        a.gate.clear()
        waiting = [asyncio.create_task(ask(system, "alias")) for _ in range(4)]
        await system.until(lambda: system.gateway.state().held.num_requests == 3)
        system.gateway.use_models([B])
        del system.members["r0"]
        system.gateway.driver.engines.set_members(system.members)
        assert await ask(system, "a") == await ask(system, "alias") == 404
        assert await ask(system, "b") == 200
        listed = (await system.client.get("/v1/models")).json()["data"]
        assert [card["id"] for card in listed] == ["b"]
        a.gate.set()
        assert await asyncio.gather(*waiting) == [200] * 4
        assert a.num_started == 4
        system.assert_empty()


async def test_that_holds_where_ray_is_faster_than_the_application():
    async with two_models() as (system, a, _b):
        a.gate.clear()
        waiting = [asyncio.create_task(ask(system, "a")) for _ in range(3)]
        await system.until(lambda: system.gateway.state().held.num_requests == 2)
        del system.members["r0"]
        system.gateway.driver.engines.set_members(system.members)
        system.gateway.use_models([B])
        a.gate.set()
        assert await asyncio.gather(*waiting) == [200] * 3
        system.assert_empty()


async def test_what_still_waits_when_the_last_engine_ends_is_told_so():
    async with two_models() as (system, a, _b):
        a.gate.clear()
        held = [asyncio.create_task(system.client.post(CHAT, json=system.chat(model="a")))]
        await system.until(lambda: a.num_started == 1)
        held.append(asyncio.create_task(system.client.post(CHAT, json=system.chat(model="a"))))
        await system.until(lambda: system.gateway.state().held.num_requests == 1)
        system.gateway.use_models([B])
        del system.members["r0"]
        system.gateway.driver.engines.set_members(system.members)
        system.servers[0].close()
        for reply in await asyncio.gather(*held):
            assert reply.status_code == 503
            assert "`a` was removed" in reply.json()["error"]["message"]
        assert await ask(system, "b") == 200
        system.assert_empty()


async def test_a_model_that_cannot_start_is_told_by_name_and_in_health():
    async with running(num_engines=0, served_names=("a", "alias", "b")) as system:
        system.gateway.use_models([A, B])
        await system.add_engine(info=msgspec.structs.replace(SMALL, model="b"))
        early = asyncio.create_task(system.client.post(CHAT, json=system.chat(model="a")))
        await system.until(lambda: system.gateway.state().held.num_requests == 1)
        system.gateway.use_failures({"Engine-a": "ValueError: no memory"})
        assert (await early).status_code == 503
        reply = await system.client.post(CHAT, json=system.chat(model="alias"))
        assert reply.status_code == 503
        error = reply.json()["error"]
        assert error["message"] == (
            "The model `alias` could not be started: ValueError: no memory."
        )
        assert (error["type"], error["param"]) == ("ServiceUnavailableError", "model")
        assert await ask(system, "b") == 200
        health = (await system.client.get("/health")).json()
        assert health["is_ready"]
        assert health["models"]["a"]["error"] == "ValueError: no memory"
        assert not health["models"]["a"]["is_ready"]
        assert "error" not in health["models"]["b"]


async def test_a_model_that_is_added_may_be_asked_before_its_engine_is_up():
    async with two_models() as (system, _a, _b):
        c = ModelEntry(deployment="Engine-c", names=("c",), ttft_target_base_s=7.5)
        system.gateway.use_models([B, A, c])
        asking = asyncio.create_task(ask(system, "c"))
        await system.until(lambda: system.gateway.state().held.num_requests == 1)
        [held] = system.gateway.router._queue.in_order("c")
        assert held.ttft_target_base_s == 7.5
        await system.add_engine(info=msgspec.structs.replace(SMALL, model="c"))
        assert await asking == 200
        system.assert_empty()
