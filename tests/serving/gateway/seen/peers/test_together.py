"""Two gateways answer as one, whichever is asked, and do what either is told."""

import asyncio
import json
import logging
import time

import msgspec
import pytest

from serving.gateway.http.listener import Listener
from serving.gateway.observe.peers import link as link_module
from serving.gateway.observe.recent import RequestWay
from serving.gateway.observe.state import GatewayState, ServiceState
from serving.gateway.tenants.keys import KeysFile, make_key
from tests.serving.gateway.seen.test_state import unlisted
from tests.support.running_gateway import (
    CHAT,
    System,
    free_port,
    introduce,
    running,
    running_together,
)

BOTH = ("g0", "g1")


@pytest.fixture
async def systems():
    async with running_together() as systems:
        yield systems


async def ask(system: System, number: int = 1, **options) -> None:
    for _ in range(number):
        reply = await system.client.post(CHAT, json=system.chat(max_tokens=2), **options)
        assert reply.status_code == 200, reply.text
    await system.until(lambda: not system.gateway.driver.exchanges)


async def state_of(system: System, query: str = "") -> ServiceState:
    reply = await system.client.get(f"/headway/state{query}")
    assert reply.status_code == 200, reply.text
    return msgspec.json.decode(reply.content, type=ServiceState)


async def post(system: System, path: str, body=None, **options):
    return await system.client.post(path, json=body, **options)


async def frame_of(system: System) -> dict:
    async with system.client.stream("GET", "/headway/live") as reply:
        async for line in reply.aiter_lines():
            if line.startswith("data:"):
                return json.loads(line[5:])
    raise AssertionError("no frame")


def draining(system: System) -> set[str]:
    replicas = system.gateway.state().replicas
    return {name for name, replica in replicas.items() if replica.is_draining}


class TestWhatIsSeen:
    async def test_the_state_is_that_of_both_and_its_schema_is_true(self, systems):
        await ask(systems[0], 1)
        await ask(systems[1], 2)
        for system in systems:
            state = await state_of(system)
            assert state.outcomes["completed"] == 3
            assert state.missing == {}
            assert state.num_gateways == 2
            assert {each.rank: each.outcomes["completed"] for each in state.gateways.values()} == {
                0: 1,
                1: 2,
            }
            assert state.gateway_id == system.gateway.gateway_id
            assert set(state.replicas) == {"r0", "r1"}
        reply = await systems[0].client.get("/headway/state")
        schema = (await systems[0].client.get("/headway/state/schema")).json()
        assert unlisted(reply.json(), schema, schema["$defs"]) == []
        # Whoever knows one gateway's state can read it, too.
        assert msgspec.json.decode(reply.content, type=GatewayState).outcomes["completed"] == 3

    async def test_each_can_be_asked_for_by_any(self, systems):
        await ask(systems[1], 2)
        for which, completed in (("g0", 0), ("0", 0), ("g1", 2), ("1", 2), ("this", 0)):
            state = await state_of(systems[0], f"?gateway={which}")
            assert (state.outcomes["completed"], state.gateways) == (completed, {})
        reply = await systems[0].client.get("/headway/state?gateway=g7")
        assert reply.status_code == 404
        assert "known: g0 (rank 0), g1 (rank 1)" in reply.json()["error"]["message"]

    async def test_one_that_is_alone_answers_as_ever(self):
        async with running() as system:
            keys = (await system.client.get("/headway/state")).json().keys()
            assert keys == set(GatewayState.__struct_fields__)
            usage = (await system.client.get("/headway/usage")).json()
            assert usage == {"gateway_id": "gateway", "tenants": {}}
            reply = await post(system, "/headway/engines/r0/drain")
            assert reply.json() == {"engine": "r0", "drains": True}

    async def test_a_request_is_found_whichever_had_it(self, systems):
        await ask(systems[1], headers={"x-request-id": "mine"})
        await ask(systems[0], headers={"x-request-id": "other"})
        for system in systems:
            reply = await system.client.get("/headway/requests?id=mine")
            way = msgspec.json.decode(reply.content, type=RequestWay)
            assert (way.id, way.gateway, way.outcome) == ("mine", 1, "completed")
            listed = (await system.client.get("/headway/requests")).json()
            assert [(way["id"], way["gateway"]) for way in listed] == [("other", 0), ("mine", 1)]
            reply = await system.client.get("/headway/requests?id=no")
            assert reply.status_code == 404
            assert "none of 2 gateways knows request 'no'" in reply.json()["error"]["message"]

    async def test_the_live_page_shows_what_the_state_says(self, systems):
        await ask(systems[0], 1)
        await ask(systems[1], 2)
        for system in systems:
            for each in systems:  # snapshots tell of the last request, too
                infos = each.gateway.state().replicas.values()
                await each.until(lambda i=infos: all(r.snapshot is not None for r in i))
            frame = await frame_of(system)
            state = (await system.client.get("/headway/state")).json()
            assert [(row["id"], row["num_open_requests"]) for row in frame["gateways"]] == [
                ("g0", 0),
                ("g1", 0),
            ]
            assert frame["missing"] == {}
            assert frame["num_gateways"] == 2
            assert sum(each["num_requests"] for each in frame["latencies"]) == 3
            assert {way["gateway"] for way in frame["requests"]} == {0, 1}
            for name in ("outcomes", "held", "policy", "tenants", "fallback", "num_placed"):
                assert frame["state"][name] == state[name]
            for name, replica in frame["state"]["replicas"].items():
                assert replica["ledger"] == state["replicas"][name]["ledger"]

    async def test_its_own_port_tells_of_one_and_changes_all(self):
        settings = {"gateway": {"metrics_port": free_port()}}
        async with running_together(**settings) as systems:
            await ask(systems[1], 2)
            gateway = systems[0].gateway
            own = Listener(gateway.own_app, gateway.config.gateway, gateway.metrics_port)
            await own.start()
            url, client = f"http://127.0.0.1:{gateway.metrics_port}", systems[0].client
            state = (await client.get(f"{url}/headway/state")).json()
            assert (state["gateway_id"], state["outcomes"]["completed"]) == ("g0", 0)
            assert "gateways" not in state
            assert (await client.get(f"{url}/headway/requests")).json() == []
            assert "gateways" not in (await client.get(f"{url}/headway/usage")).json()
            reply = await client.post(f"{url}/headway/policy", json={"policy": "round_robin"})
            assert set(reply.json()["gateways"]) == {"g0", "g1"}
            assert systems[1].gateway.state().policy == "round_robin"
            await own.stop()


async def test_usage_is_the_sum_and_each_tenant_sees_its_own(tmp_path):
    headers = {}
    with KeysFile(tmp_path / "keys.json") as file:
        for tenant, admin in (("acme", False), ("modest", False), ("ops", True)):
            text, key = make_key(tenant, admin=admin)
            file.keys.append(key)
            headers[tenant] = {"authorization": f"Bearer {text}"}
        file.save()
    auth = {"keys_file": str(tmp_path / "keys.json")}
    async with running_together(auth=auth) as systems:
        await ask(systems[0], 2, headers=headers["acme"])
        await ask(systems[1], 3, headers=headers["acme"])
        await ask(systems[1], 1, headers=headers["modest"])
        for system in systems:
            found = (await system.client.get("/headway/usage", headers=headers["ops"])).json()
            numbers = {name: used["num_requests"] for name, used in found["tenants"].items()}
            assert numbers == {"acme": 5, "modest": 1} | (
                {"ops": 0} if "ops" in found["tenants"] else {}
            )
            assert found["gateways"]["g0"]["acme"]["num_requests"] == 2
            own = (await system.client.get("/headway/usage", headers=headers["acme"])).json()
            assert list(own["tenants"]) == ["acme"]
            assert own["tenants"]["acme"]["num_requests"] == 5
            assert [list(each) for each in own["gateways"].values()] == [["acme"], ["acme"]]
            for path in ("/headway/engines/r0/drain", "/headway/engines/r0/undrain"):
                for who, status in (({}, 401), (headers["acme"], 403), (headers["ops"], 200)):
                    reply = await post(system, path, headers=who)
                    assert reply.status_code == status


class TestWhatIsOrdered:
    async def test_a_policy_holds_on_both_and_on_one_that_comes_later(self, systems):
        reply = await post(
            systems[1], "/headway/policy", {"policy": "headway", "ablate": ["order"]}
        )
        order = {"policy": "headway", "ablate": ["order"]}
        assert reply.json() == {**order, "gateways": {"g0": order, "g1": order}}
        assert [each.gateway.state().ablate for each in systems] == [["order"]] * 2
        settings = {"gateway": {"replicas": 2}}
        async with (
            running(0, rank=2, gateway_id="g2", **settings) as late,
            running(
                0, rank=3, gateway_id="g3", router={"policy": "cache_aware"}, **settings
            ) as new,
        ):
            await introduce([*systems, late, new])
            assert late.gateway.state().ablate == ["order"]
            assert new.gateway.state().policy == "cache_aware"  # it is configured to be another
            reply = await post(late, "/headway/policy", {"policy": "round_robin"})
            gateways = reply.json()["gateways"]
            assert gateways.pop("g3") == {
                "error": "another policy is configured there, which holds"
            }
            order = {"policy": "round_robin", "ablate": []}
            assert gateways == dict.fromkeys(("g0", "g1", "g2"), order)
            assert [each.gateway.state().policy for each in systems] == ["round_robin"] * 2

    async def test_a_bad_policy_changes_nothing(self, systems):
        reply = await post(systems[0], "/headway/policy", {"policy": "nonsense"})
        assert reply.status_code == 400
        assert [each.gateway.state().policy for each in systems] == ["headway"] * 2

    async def test_an_engine_that_drains_ends_what_it_has_and_gets_nothing_new(self, systems):
        for engine in systems[0].engines:
            engine.gate.clear()
        running = [
            asyncio.create_task(system.client.post(CHAT, json=system.chat(max_tokens=2)))
            for system in systems
            for _ in range(4)
        ]
        servers = systems[0].servers
        await systems[0].until(lambda: sum(server.num_streams for server in servers) == 8)
        assert servers[0].num_streams
        reply = await post(systems[1], "/headway/engines/r0/drain")
        both = {name: {"drains": True} for name in BOTH}
        assert reply.json() == {"engine": "r0", "drains": True, "gateways": both}
        assert [draining(each) for each in systems] == [{"r0"}] * 2
        for engine in systems[0].engines:
            engine.gate.set()
        replies = await asyncio.gather(*running)
        assert all(reply.status_code == 200 and "[DONE]" in reply.text for reply in replies)
        before = systems[0].engines[0].num_started
        for system in systems:
            await ask(system, 4)
        assert systems[0].engines[0].num_started == before
        state = await state_of(systems[0])
        assert state.drained == ["r0"]
        assert [state.replicas[name].is_draining for name in ("r0", "r1")] == [True, False]
        metrics = (await systems[0].client.get("/metrics")).text
        assert 'headway_engine_draining{engine="r0",gateway="0"} 1.0' in metrics

        reply = await post(systems[0], "/headway/engines/r0/undrain")
        assert reply.json()["gateways"] == {name: {"drains": False} for name in BOTH}
        assert [draining(each) for each in systems] == [set()] * 2
        await post(systems[0], "/headway/engines/r1/drain")
        for system in systems:
            await ask(system, 2)
        assert systems[0].engines[0].num_started == before + 4

    async def test_a_drain_outlasts_a_connection_and_reaches_who_comes_later(self, systems):
        await post(systems[0], "/headway/engines/r0/drain")
        engines = systems[0].gateway.driver.engines
        before = engines._connections["r0"]
        before.close()
        await systems[0].until(lambda: engines._connections.get("r0") not in (before, None))
        await systems[0].until(lambda: "r0" in engines.infos)
        assert draining(systems[0]) == {"r0"}
        async with running(0, rank=2, gateway_id="g2", gateway={"replicas": 2}) as late:
            await introduce([*systems, late])
            late.gateway.driver.engines.set_members(systems[0].members)
            await late.until(lambda: len(late.gateway.driver.engines.infos) == 2)
            assert draining(late) == {"r0"}

    @pytest.mark.parametrize("engine", ["r7", "", "r0/x"])
    async def test_an_unknown_engine_is_a_404_that_names_the_others(self, systems, engine):
        for what in ("drain", "undrain"):
            reply = await post(systems[0], f"/headway/engines/{engine}/{what}")
            assert reply.status_code == 404
            assert reply.json()["error"]["message"].endswith("known: r0, r1")
        assert (await systems[0].client.get("/headway/engines/r0/drain")).status_code == 405

    async def test_drains_by_admins_and_by_hardware_add_up(self, systems):
        engines = systems[0].gateway.driver.engines
        engines.empty({"r0"})
        await post(systems[0], "/headway/engines/r0/drain")
        engines.empty(set())
        assert draining(systems[0]) == {"r0"}
        engines.empty({"r0"})
        await post(systems[0], "/headway/engines/r0/undrain")
        assert draining(systems[0]) == {"r0"}

    async def test_files_are_read_again_on_both(self, tmp_path):
        path = tmp_path / "keys.json"
        with KeysFile(path) as file:
            text, key = make_key("ops", admin=True)
            file.keys.append(key)
            file.save()
        headers = {"authorization": f"Bearer {text}"}
        async with running_together(auth={"keys_file": str(path)}) as systems:
            reply = await post(systems[0], "/headway/reload", headers=headers)
            fresh = {"auth.keys_file": {"num_reloads": 1, "error": None}}
            assert reply.json() == {**fresh, "gateways": {"g0": fresh, "g1": fresh}}
            path.write_text("nonsense")
            reply = await post(systems[1], "/headway/reload", headers=headers)
            for each in reply.json()["gateways"].values():
                assert "is not a keys file" in each["auth.keys_file"]["error"]
            state = (await systems[0].client.get("/headway/state", headers=headers)).json()
            assert "is not a keys file" in state["files"]["auth.keys_file"]["error"]

    async def test_each_change_is_in_the_log_of_each(self, systems, caplog):
        caplog.set_level(logging.INFO, "serving.audit")
        await post(systems[0], "/headway/engines/r0/drain")
        await post(systems[1], "/headway/engines/r0/undrain")
        await post(systems[0], "/headway/reload")
        somebody = "somebody, as no keys are set, at 127.0.0.1"
        lines = [each.getMessage() for each in caplog.records if each.name == "serving.audit"]
        assert lines == [
            f"{somebody} drained engine r0",
            f"gateway g0 says: {somebody} drained engine r0",
            f"{somebody} took back engine r0",
            f"gateway g1 says: {somebody} took back engine r0",
            f"{somebody} reloaded keys and config",
            f"gateway g0 says: {somebody} reloaded keys and config",
        ]


class TestOneThatDoesNotAnswer:
    async def test_a_hung_one_is_named_and_hears_of_orders_later(self, systems, monkeypatch):
        monkeypatch.setattr(link_module, "ANSWER_TIMEOUT_S", 0.2)
        hung = systems[1].gateway.together
        may_answer, answer = asyncio.Event(), hung.answer

        async def answer_later(what, body):
            await may_answer.wait()
            return await answer(what, body)

        monkeypatch.setattr(hung.peers._port, "answer", answer_later)
        await ask(systems[0], 1)
        began_s = time.monotonic()
        state = await state_of(systems[0])
        assert time.monotonic() - began_s < 1.0
        assert state.outcomes["completed"] == 1
        assert list(state.gateways) == ["g0"]
        assert "has not answered" in state.missing["g1"]
        reply = await systems[0].client.get("/headway/state?gateway=g1")
        assert reply.status_code == 503
        frame = await frame_of(systems[0])
        assert list(frame["missing"]) == ["g1"]
        reply = (await post(systems[0], "/headway/engines/r0/drain")).json()
        assert reply["gateways"]["g0"] == {"drains": True}
        assert "hears of this when it can" in reply["gateways"]["g1"]["error"]
        assert draining(systems[1]) == set()
        may_answer.set()
        await systems[1].until(lambda: draining(systems[1]) == {"r0"})

    async def test_a_dead_one_takes_nothing_along(self, systems):
        systems[1].gateway.together.peers.close()
        await ask(systems[0], 1)
        await systems[0].until(lambda: not systems[0].gateway.together.peers._links)
        state = await state_of(systems[0])
        assert state.missing == {"g1": "there is no connection to it"}
        assert state.outcomes["completed"] == 1
        reply = (await systems[0].client.get("/headway/requests?id=no")).json()
        assert "g1 does not say: there is no connection to it" in reply["error"]["message"]

    async def test_one_of_another_version_is_named(self, systems, monkeypatch):
        async def answer(what, body):
            return msgspec.msgpack.encode({"policy": 7})

        monkeypatch.setattr(systems[1].gateway.together.peers._port, "answer", answer)
        state = await state_of(systems[0])
        assert state.missing["g1"].startswith("it is of another version")
