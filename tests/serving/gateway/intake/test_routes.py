"""`model: "auto"`: a gateway chooses among models, says so, and keeps to what a client may use."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from typing import Any, get_args

import httpx
import msgspec

from router.core.choice.settings import Cue, Trait
from serving.config import parse
from serving.gateway.intake.length.cues import CUES, OPTIONS
from serving.gateway.intake.routes import traits_of
from tests.serving.gateway.tenants.office import Office
from tests.support.fakes import INFO, FakeEngine
from tests.support.provider_server import ProviderServer, configured, listening
from tests.support.running_gateway import CHAT, System, running

ROUTE = {
    "models": {"small": {"quality": 1, "cost": 1}, "large": {"quality": 3, "cost": 8}},
    "rules": [
        {"name": "code", "when": {"asks": ["code"]}, "models": ["large", "small"]},
        {"prefer": "cheapest"},
    ],
}
CODE = "Write a python function that sorts a list"


@contextlib.asynccontextmanager
async def two_models(
    route: dict[str, Any] = ROUTE, **settings: Any
) -> AsyncIterator[tuple[System, FakeEngine, FakeEngine]]:
    """Models small and large, with an engine each, and a route before them."""
    names = ("small", "large")
    async with running(0, names, routes={"auto": route}, **settings) as system:
        small, large = [
            await system.add_engine(info=msgspec.structs.replace(INFO, model=name))
            for name in names
        ]
        yield system, small, large


def body_of(system: System, text: str = "hi", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return system.chat(**{"model": "auto", "messages": messages, "max_tokens": 2, **fields})


async def test_the_chosen_models_engine_gets_it_under_its_own_name():
    async with two_models() as (system, small, large):
        reply = await system.client.post(CHAT, json=body_of(system, CODE))
        assert reply.status_code == 200
        assert reply.headers["x-headway-model"] == "large"
        why = reply.headers["x-headway-why"]
        assert why.startswith("rule code (asks code): best of large, small; first token in ")
        assert (large.bodies[0]["model"], small.num_started) == ("large", 0)
        reply = await system.client.post(CHAT, json=body_of(system))
        assert reply.headers["x-headway-model"] == small.bodies[0]["model"] == "small"
        # By its name a model is asked for as ever, and nothing is said of a choice.
        reply = await system.client.post(CHAT, json=body_of(system, CODE, model="small"))
        assert small.num_started == 2
        assert "x-headway-why" not in reply.headers
        assert system.gateway.state().num_chosen == {"auto": {"large": 1, "small": 1}}
        system.assert_empty()


async def test_a_choice_is_told_of_later(tmp_path):
    async with two_models(log={"dir": str(tmp_path)}) as (system, _small, _large):
        reply = await system.client.post(CHAT, json=body_of(system, CODE))
        assert reply.status_code == 200
        request_id, why = reply.headers["x-request-id"], reply.headers["x-headway-why"]
        reply = await system.client.get(f"/headway/requests?id={request_id}")
        assert reply.status_code == 200, reply.text
        way = reply.json()
        chosen = next(event for event in way["events"] if event["what"] == "chosen")
        assert (chosen["where"], chosen["why"]) == ("large", f"auto: {why}")
        assert way["model"] == "large"
        await system.client.post(CHAT, json=body_of(system, model="small"))
        system.gateway.observer.close()
        first, second = map(json.loads, (tmp_path / "requests-0.log").read_text().splitlines())
        assert (first["model"], first["route"], first["why"]) == ("large", "auto", why)
        assert second["model"] == "small"
        assert second.keys().isdisjoint(("route", "why"))
        text = (await system.client.get("/metrics")).text
        assert re.search(r'headway_requests_total{[^}]*model="large"[^}]*} 1', text)


async def test_routes_are_listed_behind_their_models():
    async with two_models() as (system, _small, _large):
        cards = (await system.client.get("/v1/models")).json()["data"]
        assert [card["id"] for card in cards] == ["large", "small", "auto"]
        assert cards[-1]["max_model_len"] == INFO.max_model_len
        card = (await system.client.get("/v1/models/auto")).json()
        assert (card["id"], card["owned_by"]) == ("auto", "headway")


async def test_a_dead_models_requests_go_to_the_next_and_back():
    async with two_models() as (system, small, large):
        system.servers[1].close()
        await system.until(lambda: len(system.gateway.driver.engines.infos) == 1)
        reply = await system.client.post(CHAT, json=body_of(system, CODE))
        assert reply.headers["x-headway-model"] == "small"
        assert "not large: no live engine" in reply.headers["x-headway-why"]
        assert (small.num_started, large.num_started) == (1, 0)
        again = await system.add_engine(info=msgspec.structs.replace(INFO, model="large"))
        await system.client.post(CHAT, json=body_of(system, CODE))
        assert again.num_started == 1


async def test_what_comes_before_any_engine_waits_for_the_preferred_one():
    async with running(0, ("small", "large"), routes={"auto": ROUTE}) as system:
        asking = asyncio.create_task(system.client.post(CHAT, json=body_of(system, CODE)))
        await system.until(lambda: system.gateway.state().held.num_requests == 1)
        assert system.gateway.state().held.num_tokens_by_model.keys() == {"large"}
        await system.add_engine(info=msgspec.structs.replace(INFO, model="large"))
        reply = await asking
        assert reply.status_code == 200
        assert reply.headers["x-headway-why"].endswith("; no live engine yet")


async def test_a_tenant_never_gets_a_model_that_it_may_not_use(tmp_path):
    office = Office(tmp_path)
    free, none, paid = [office.hire(tenant) for tenant in ("free", "none", "paid")]
    tenants = {"free": {"models": ["small", "auto"]}, "none": {"models": ["auto"]}}
    auth = {"keys_file": str(office.path)}
    async with two_models(auth=auth, tenants=tenants) as (system, small, large):

        async def ask(headers: dict[str, str]) -> tuple[httpx.Response, list[str]]:
            listed = (await system.client.get("/v1/models", headers=headers)).json()["data"]
            reply = await system.client.post(CHAT, json=body_of(system, CODE), headers=headers)
            return reply, [card["id"] for card in listed]

        reply, listed = await ask(free)
        assert reply.headers["x-headway-model"] == "small"
        assert "large" not in reply.headers["x-headway-why"]  # nor does it hear of it
        assert listed == ["small", "auto"]
        reply, listed = await ask(none)
        assert (reply.status_code, listed) == (404, [])
        assert (small.num_started, large.num_started) == (1, 0)
        reply, _ = await ask(paid)
        assert reply.headers["x-headway-model"] == "large"


async def test_how_much_to_think_is_a_choice_unless_the_client_says_it():
    models = {
        "quick": {"model": "small", "thinking": False, "quality": 1},
        "deep": {"model": "small", "thinking": True, "quality": 2},
    }
    route = {"models": models, "rules": [{"when": {"asks": ["code"]}}, {"models": ["quick"]}]}
    async with two_models(route) as (system, small, _large):
        own = {"chat_template_kwargs": {"enable_thinking": True}}
        for text, fields in (
            (CODE, {}),
            ("what is effort", {}),
            ("hi", own),
            ("hi", {"reasoning_effort": "low"}),
        ):
            await system.client.post(CHAT, json=body_of(system, text, **fields))
        said = [body.get("chat_template_kwargs") for body in small.bodies]
        assert said == [{"enable_thinking": True}, {"enable_thinking": False}, *own.values(), None]


async def test_a_providers_model_is_on_a_route_and_gets_the_clients_own_body():
    models = {"small": {"quality": 1}, "far": {"quality": 9, "thinking": True}}
    server = ProviderServer()
    async with listening(server):
        provider = configured(server, models={"far": "theirs"})
        async with two_models({"models": models}, **provider) as (system, small, _large):
            reply = await system.client.post(CHAT, json=body_of(system))
            assert reply.status_code == 200
            assert reply.headers["x-headway-model"] == "far"
            assert reply.headers["x-headway-why"] == "rule 1: best of small, far; by a provider"
            [body] = server.bodies
            assert body["model"] == "theirs"
            assert "chat_template_kwargs" not in body
            assert small.num_started == 0
            cards = (await system.client.get("/v1/models")).json()["data"]
            assert [card["id"] for card in cards] == ["large", "small", "far", "auto"]


async def test_a_session_keeps_its_model_as_far_as_the_rules_have_it():
    route = {**ROUTE, "rules": [ROUTE["rules"][0], {"prefer": "cheapest"}]}
    async with two_models(route) as (system, _small, _large):
        found = []
        for text, fields in (
            ("hi", {"session_id": "s"}),
            (CODE, {"session_id": "t"}),
            ("hi", {"session_id": "t"}),
            ("hi", {}),
            ("hi", {"session_id": "s"}),
        ):
            reply = await system.client.post(CHAT, json=body_of(system, text, **fields))
            why = reply.headers["x-headway-why"].partition(";")[0]
            found.append((reply.headers["x-headway-model"], why))
        assert found == [
            ("small", "rule 2: cheapest of small, large"),
            ("large", "rule code (asks code): best of large, small"),
            ("large", "rule 2: kept of small, large"),
            ("small", "rule 2: cheapest of small, large"),
            ("small", "rule 2: kept of small, large"),
        ]


async def test_replies_say_nothing_where_that_is_switched_off_and_routes_may_change():
    async with two_models(gateway={"reply_headers": False}) as (system, small, large):
        reply = await system.client.post(CHAT, json=body_of(system, CODE))
        assert reply.headers.keys().isdisjoint(("x-headway-model", "x-headway-why"))
        assert large.num_started == 1
        changed = {**ROUTE, "rules": [{"models": ["small"]}]}
        system.gateway._use_config(parse({"routes": {"other": changed}}))
        assert (await system.client.post(CHAT, json=body_of(system))).status_code == 404
        await system.client.post(CHAT, json=body_of(system, CODE, model="other"))
        assert small.num_started == 1


async def test_what_a_route_cannot_be_asked_for_is_said():
    async with two_models() as (system, _small, _large):
        body = {"model": "auto", "input": "go on", "previous_response_id": "resp_1"}
        reply = await system.client.post("/v1/responses", json=body)
        assert reply.status_code == 400
        error = reply.json()["error"]
        assert error["message"] == (
            "A response is kept by the model that gave it: name it in place of 'auto'."
        )
        assert error["param"] == "model"
        form = {"files": {"file": b"RIFF"}, "data": {"model": "auto"}}
        reply = await system.client.post("/v1/audio/transcriptions", **form)
        assert reply.status_code == 400
        reply = await system.client.post(CHAT, json={"model": "auto", "messages": []})
        assert reply.status_code == 400
        reply = await system.client.post("/v1/embeddings", json={"model": "auto", "input": "hi"})
        assert reply.status_code == 404  # neither model embeds
        system.assert_empty()


def test_rules_have_the_words_that_the_gateway_finds():
    assert get_args(Cue) == CUES
    media = {"images", "audio", "video"}
    # What says how an answer is sampled is not read of requests.
    assert set(get_args(Trait)) == set(OPTIONS) - {"greedy", "hot"} | media
    assert not set(get_args(Cue)) & set(get_args(Trait))


def test_media_are_found_by_their_kind_and_not_in_what_is_said_of_them():
    part = msgspec.json.encode([{"type": "image_url", "image_url": {"url": "data:..."}}])
    assert traits_of((), part) == {"images"}
    assert traits_of((), msgspec.json.encode([{"type": "input_audio"}])) == {"audio"}
    assert traits_of((), msgspec.json.encode([{"text": 'the field "image_url" is'}])) == frozenset()
