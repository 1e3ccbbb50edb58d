"""LoRA adapters that come and go while engines serve: who loads them, and who hears of it."""

import asyncio
import json
import logging

import msgspec
import pytest
from starlette.types import Receive, Scope, Send

from serving.engine.vllm.adapters.watch import REGISTER
from serving.gateway.http.endpoints.adapters import LOAD, UNLOAD
from serving.gateway.intake.served_models import ModelEntry
from tests.support.fakes import INFO, FakeEngine
from tests.support.running_gateway import CHAT, System, running, running_together

ADAPTERS = "/adapters"
ROUTES = (
    *(f"POST {path}" for path in (LOAD, UNLOAD, REGISTER, ADAPTERS)),
    "DELETE /adapters/{adapter_name}",
    f"POST {CHAT}",
)


class Adapting:
    """Serves adapters as vLLM does, with paths for files; runs what else it is asked."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.told: list[tuple[str, str]] = []  # path and adapter
        self.refuses = False
        self.tells = True  # what it serves, as engines of ours do
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self._run = engine.app
        engine.app = self  # type: ignore[assignment]
        engine.adapter_paths = dict(engine.info.adapters)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path not in (LOAD, UNLOAD, REGISTER):
            await self._run(scope, receive, send)
            return
        body = json.loads((await receive())["body"])
        name, paths = body["lora_name"], self.engine.adapter_paths
        self.told.append((path, name))
        await self.may_answer.wait()
        status, said = 200, "Success"
        is_there = name in paths and not body.get("load_inplace")
        if self.refuses or is_there != (path == UNLOAD):
            status, said = 404 if path == UNLOAD else 400, "no"
        elif path == UNLOAD:
            self.use({each: paths[each] for each in paths if each != name})
        else:
            self.use(paths | {name: body["lora_path"]})
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": said.encode()})

    def use(self, paths: dict[str, str]) -> None:
        if self.tells:
            self.engine.adapter_paths = paths
            self.engine._on_step()


async def add(system: System, *, refuses: bool = False, **fields) -> Adapting:
    """Add an engine; what it serves at its start it tells with its description."""
    info = msgspec.structs.replace(INFO, routes=ROUTES, max_loras=1, **fields)
    adapting = Adapting(FakeEngine(info.with_adapters(info.adapters)))
    adapting.refuses = refuses
    await system.add_engine(engine=adapting.engine)
    return adapting


async def load(system: System, name: str = "french", **fields):
    body = {"lora_name": name, "lora_path": f"/{name}", **fields}
    return await system.client.post(LOAD, json=body)


async def unload(system: System, name: str = "french"):
    return await system.client.post(UNLOAD, json={"lora_name": name})


async def names(system: System) -> list[str]:
    reply = await system.client.get("/v1/models")
    return [card["id"] for card in reply.json()["data"]]


async def status_of(system: System, model: str) -> int:
    reply = await system.client.post(CHAT, json=system.chat(model=model, max_tokens=1))
    return reply.status_code


async def test_one_engine_loads_it_and_the_others_need_not():
    async with running(num_engines=0) as system:
        one, other = await add(system), await add(system)
        assert await status_of(system, "french") == 404
        reply = await load(system)
        assert reply.status_code == 200
        assert {each["status"] for each in reply.json()["engines"].values()} == {200}
        assert sorted([*one.told, *other.told]) == [(REGISTER, "french"), (LOAD, "french")]
        assert await names(system) == ["fake-model", "french"]
        assert await status_of(system, "french") == 200
        card = (await system.client.get("/v1/models/french")).json()
        assert (card["root"], card["parent"]) == ("/french", "fake-model")
        assert (await load(system)).status_code == 400  # as vLLM: it is there
        assert (await unload(system)).status_code == 200
        assert await names(system) == ["fake-model"]
        assert await status_of(system, "french") == 404
        assert await status_of(system, "fake-model") == 200
        assert (await unload(system)).status_code == 404
        system.assert_empty()


async def test_one_that_does_not_fit_is_served_nowhere():
    async with running(num_engines=0) as system:
        engines = [await add(system), await add(system)]
        for each in engines:
            each.refuses = True
        assert (await load(system)).status_code == 400
        assert [path for each in engines for path, _ in each.told] == [LOAD]
        assert await status_of(system, "french") == 404


async def test_sagemakers_form_is_the_same():
    async with running(num_engines=0) as system:
        await add(system)
        body = {"name": "french", "src": "/french"}
        assert (await system.client.post(ADAPTERS, json=body)).status_code == 200
        assert await names(system) == ["fake-model", "french"]
        assert (await system.client.delete("/adapters/french")).status_code == 200
        assert await names(system) == ["fake-model"]


async def test_an_engine_that_comes_later_is_told():
    async with running(num_engines=0) as system:
        await add(system)
        await load(system)
        await load(system, "german")
        await unload(system, "german")
        static = {"german": "/german", "own": "/own"}
        late = await add(system, adapters=static)
        await system.until(lambda: len(late.told) == 2)
        assert sorted(late.told) == [(REGISTER, "french"), (UNLOAD, "german")]
        infos = system.gateway.driver.engines.infos
        await system.until(lambda: infos["r1"].adapters.keys() == {"own", "french"})


async def test_an_engine_that_comes_while_it_is_loaded_is_told():
    async with running(num_engines=0) as system:
        first = await add(system)
        first.may_answer.clear()
        loading = asyncio.ensure_future(load(system))
        await system.until(lambda: bool(first.told))
        late = await add(system)
        assert late.told == []
        first.may_answer.set()
        assert (await loading).status_code == 200
        await system.until(lambda: late.told == [(REGISTER, "french")])


async def test_an_engine_that_comes_with_what_another_path_replaced_is_told():
    async with running(num_engines=0) as system:
        await add(system, adapters={"french": "/old", "own": "/own"})
        assert (await load(system, lora_path="/new", load_inplace=True)).status_code == 200
        late = await add(system, adapters={"french": "/old", "own": "/own"})
        infos = system.gateway.driver.engines.infos
        await system.until(lambda: infos["r1"].adapters == {"french": "/new", "own": "/own"})
        assert late.told == [(REGISTER, "french")]


async def test_one_can_be_unloaded_while_no_engine_tells_of_it():
    """All are away; they are other people's, which tell nothing."""
    async with running(num_engines=0) as system:
        await add(system)
        assert (await load(system)).status_code == 200
        system.servers[0].close()
        await system.until(lambda: not system.gateway.driver.engines.infos)
        reply = await unload(system)
        assert (reply.status_code, reply.json()) == (200, {"engines": {}})
        assert (await unload(system)).status_code == 503  # no engine is up to ask
        system.members.clear()
        other = await add(system, is_external=True)
        assert other.told == []
        other.tells = False
        assert (await load(system)).status_code == 200
        reply = await unload(system)
        assert list(reply.json()["engines"].values()) == [{"status": 404, "answer": "no"}]
        assert [path for path, _ in other.told] == [LOAD, UNLOAD]
        orders = system.gateway.together.orders.orders.adapters
        assert orders["french"].load is None


async def test_an_engine_that_cannot_have_it_is_not_sent_its_requests(caplog):
    async with running(num_engines=0) as system:
        await add(system)
        await load(system)
        with caplog.at_level(logging.WARNING):
            await add(system, refuses=True)
            await system.until(lambda: "engine r1: LoRA adapter french" in caplog.text)
        for _ in range(10):
            assert await status_of(system, "french") == 200
        assert system.engines[1].num_started == 0


async def test_while_all_engines_are_away_it_is_held_not_unknown():
    async with running(num_engines=0) as system:
        await add(system)
        await load(system)
        system.servers[0].close()
        await system.until(lambda: not system.gateway.driver.engines.infos)
        asking = asyncio.ensure_future(status_of(system, "french"))
        await system.until(lambda: system.gateway.state().held.num_requests == 1)
        await add_again(system)
        assert await asking == 200


async def add_again(system: System) -> None:
    """Add an engine in place of the first one, as if that had been started anew."""
    system.members.clear()
    await add(system)


async def test_what_waits_for_it_when_it_is_unloaded_is_told_so():
    async with running(num_engines=0) as system:
        one = await add(system, adapters={"french": "/french"})
        system.gateway.driver.engines.drain("r0", drains=True)
        asking = asyncio.ensure_future(system.client.post(CHAT, json=system.chat(model="french")))
        await system.until(lambda: system.gateway.state().held.num_requests == 1)
        one.use({})
        reply = await asking
        assert reply.status_code == 503
        assert "was unloaded" in reply.text
        system.assert_empty()


async def test_several_models_are_told_apart():
    async with running(num_engines=0) as system:
        one = await add(system, adapters={"own": "/own"})
        other = await add(system, model="other")
        reply = await load(system)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "model")
        assert "fake-model, other" in reply.json()["error"]["message"]
        assert (await load(system, model="none")).status_code == 404
        assert (await load(system, model="other")).status_code == 200
        assert (one.told, other.told) == ([], [(LOAD, "french")])
        for name in ("fake-model", "french", "own"):
            reply = await load(system, name, model="other" if name == "own" else "fake-model")
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "lora_name")
        assert (await unload(system)).status_code == 200  # only one model has it
        assert other.told[-1] == (UNLOAD, "french")


async def test_an_order_is_read_as_vllm_reads_it():
    async with running(num_engines=0) as system:
        one, other = await add(system), await add(system, model="other")
        for fields in ({"model": None}, {"model": None, "load_inplace": 1}):
            reply = await load(system, **fields)
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "model")
        reply = await load(system, model=5)
        assert "has to be a string" in reply.json()["error"]["message"]
        assert one.told == other.told == []
        body = {"src": 5, "load_inplace": "true", "is_3d_lora_weight": 0}
        reply = await load(system, model="other", **body)
        assert reply.status_code == 200, reply.text
        assert one.told == []
        order = system.gateway.together.orders.orders.adapters["french"].load
        assert order == {
            "lora_name": "french",
            "lora_path": "/french",
            "load_inplace": True,
            "is_3d_lora_weight": False,
        }


async def test_names_of_what_has_no_engine_now_are_taken():
    routes = {
        "auto": {
            "models": {"fake-model": {"cost": 1}, "asleep": {"cost": 2}},
            "rules": [{"prefer": "cheapest"}],
        }
    }
    async with running(num_engines=0, routes=routes) as system:
        entries = [
            ModelEntry(deployment="a", names=("fake-model", "own")),
            ModelEntry(deployment="b", names=("asleep", "nap"), scales=True),
        ]
        system.gateway.served_models.use_entries(entries)
        one = await add(system)
        for name, owner in (("auto", "auto"), ("asleep", "asleep"), ("nap", "asleep")):
            reply = await load(system, name)
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "lora_name")
            assert f"'{owner}' has it" in reply.json()["error"]["message"]
        assert one.told == []
        assert (await load(system, "own")).status_code == 200  # an adapter of its own from before
        other = await add(system, model="other")
        system.servers[0].close()
        await system.until(lambda: len(system.gateway.driver.engines.infos) == 1)
        reply = await load(system, "own")
        assert "'fake-model' has it" in reply.json()["error"]["message"]
        assert other.told == []


@pytest.mark.parametrize("loaded_by", [0, 1])
async def test_every_gateway_knows(loaded_by):
    async with running_together(2, 0) as systems:
        first = systems[0]
        await add(first)
        systems[1].gateway.driver.engines.set_members(first.members)
        infos = systems[1].gateway.driver.engines.infos
        await systems[1].until(lambda: len(infos) == 1)
        assert (await load(systems[loaded_by])).status_code == 200
        for system in systems:
            await system.until(
                lambda s=system: "french" in s.gateway.driver.engines.infos["r0"].adapters
            )
            assert await status_of(system, "french") == 200
            assert "french" in system.gateway.together.orders.orders.adapters
        late = await add(first)
        systems[1].gateway.driver.engines.set_members(first.members)
        await systems[1].until(lambda: len(infos) == 2)
        await first.until(lambda: late.engine.adapter_paths == {"french": "/french"})
        assert (await unload(systems[1 - loaded_by])).status_code == 200
        for system in systems:
            infos = system.gateway.driver.engines.infos
            await system.until(
                lambda infos=infos: not any(info.adapters for info in infos.values())
            )
            assert await status_of(system, "french") == 404
