"""The gateway with providers behind it: real HTTP on both sides."""

import asyncio
import json
import logging
import time

import httpx
import msgspec
import pytest

from router.resilience.breaker import BreakerState
from serving.config import ConfigError, parse
from serving.gateway.observe.state import GatewayState
from tests.support.provider_server import (
    MODEL,
    MODELS,
    NUMBERS,
    breaker,
    budget,
    configured,
    serving,
)
from tests.support.running_gateway import CHAT, running


def texts(reply: httpx.Response) -> str:
    """The text of a streamed reply."""
    events = [line[6:] for line in reply.text.split("\n") if line.startswith("data: {")]
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    return "".join(choice["delta"]["content"] for choice in choices)


async def test_without_engines_the_provider_answers_streamed_and_whole():
    async with (
        serving(name="far") as server,
        running(
            num_engines=0,
            **configured(server, defaults={"user": "us"}, keys=[{"returns_unused_tokens": True}]),
        ) as system,
    ):
        reply = await system.client.post(CHAT, json=system.chat(max_tokens=3))
        assert reply.status_code == 200
        assert reply.headers["x-headway-provider"] == "p0"
        assert texts(reply) == "far far far "
        assert reply.text.endswith("data: [DONE]\n\n")
        assert "usage" not in reply.text  # the client did not ask for it; we did
        [body] = server.bodies
        assert body["model"] == MODEL
        assert body["user"] == "us"
        whole = await system.client.post(
            CHAT, json=system.chat(max_tokens=2, stream=False, user="me", priority_class="batch")
        )
        assert whole.json()["choices"][0]["message"]["content"] == "far far"
        assert server.bodies[1]["user"] == "me"
        assert "priority_class" not in server.bodies[1]
        state = system.gateway.state().fallback
        assert state.num_spilled == 2
        assert budget(system).tokens.used == (1 + 3) + (1 + 2)
        assert system.outcomes["completed"] == 2
        system.assert_empty()


async def test_a_client_that_asks_for_usage_gets_it():
    async with serving() as server, running(num_engines=0, **configured(server)) as system:
        options = {"include_usage": True}
        reply = await system.client.post(CHAT, json=system.chat(stream_options=options))
        assert '"completion_tokens": 16' in reply.text


async def test_usage_and_cost_are_accounted():
    async with (
        serving() as server,
        running(num_engines=0, **configured(server, price_prompt=1e6, price_output=2e6)) as system,
    ):
        await system.client.post(CHAT, json=system.chat(max_tokens=5))
        assert system.gateway.state().fallback.providers["p0"].cost == 1 + 5 * 2
        metrics = (await system.client.get("/metrics")).text
        assert 'headway_provider_cost_total{gateway="0",provider="p0"} 11.0' in metrics
        assert 'headway_fallbacks_total{gateway="0"} 1.0' in metrics


async def test_engines_come_first_and_the_same_request_answers_when_they_are_gone():
    async with serving(name="far") as server, running(**configured(server)) as system:
        del (body := system.chat(max_tokens=2))["model"]  # as in the README's curl
        reply = await system.client.post(CHAT, json=body)
        assert reply.text.count("data: {}") == 2
        for engine_server in system.servers:
            engine_server.close()
        await system.until(lambda: not system.gateway.driver.engines.infos)
        reply = await system.client.post(CHAT, json=body)
        assert reply.status_code == 200
        assert texts(reply) == "far far "
        health = await system.client.get("/health")
        assert health.status_code == 200
        assert health.json()["status"] == "providers only"


@pytest.mark.parametrize("trouble", ["error", "error event", "no money"])
async def test_before_the_first_token_the_next_provider_takes_over(trouble):
    async with (
        serving(trouble=trouble) as bad,
        serving(name="good") as good,
        running(num_engines=0, **configured(bad, good)) as system,
    ):
        reply = await system.client.post(CHAT, json=system.chat(max_tokens=2))
        assert texts(reply) == "good good "
        assert reply.headers["x-headway-provider"] == "p1"
        assert system.outcomes == {**system.outcomes, "completed": 1, "failed": 0}
        system.assert_empty()


async def test_a_provider_that_says_nothing_is_left_in_time():
    async with serving(trouble="silence") as bad, serving(name="good") as good:
        fields = {"first_token_timeout_s": 0.3}
        async with running(num_engines=0, **configured(bad, good, **fields)) as system:
            start_s = time.monotonic()
            reply = await system.client.post(CHAT, json=system.chat(max_tokens=2))
            assert texts(reply) == "good good "
            assert 0.3 <= time.monotonic() - start_s < 2
            await system.until(lambda: bad.num_open == 0)


@pytest.mark.parametrize("trouble", ["stall", "break"])
async def test_after_the_first_token_a_failure_is_an_error_event(trouble):
    async with serving(trouble=trouble) as bad, serving() as good:
        fields = {"stall_timeout_s": 0.3}
        async with running(num_engines=0, **configured(bad, good, **fields)) as system:
            reply = await system.client.post(CHAT, json=system.chat(max_tokens=5))
            assert '"error"' in reply.text
            assert "provider p0/default" in reply.text
            assert "[DONE]" not in reply.text
            assert system.outcomes["failed"] == 1
            assert not good.bodies
            system.assert_empty()


@pytest.mark.parametrize("trouble", ["stall", "break"])
async def test_after_the_first_token_a_provider_that_can_goes_on_with_it(trouble):
    """The client sees one reply: no word twice, none missing, one id, the usage of all of it."""
    async with (
        serving(name="first", words=NUMBERS, trouble=trouble) as bad,
        serving(name="plain") as plain,
        serving(name="second", words=NUMBERS) as good,
    ):
        section = configured(bad, plain, good, stall_timeout_s=0.3)
        section["providers"][2]["continues"] = True
        async with running(num_engines=0, **section) as system:
            body = system.chat(max_tokens=6, stream_options={"include_usage": True})
            reply = await system.client.post(CHAT, json=body)
            assert texts(reply) == "0 1 2 3 4 5 "
            assert reply.text.endswith("data: [DONE]\n\n")
            events = [json.loads(line[6:]) for line in reply.text.split("\n") if "{" in line]
            assert {event["id"] for event in events} == {"first"}
            assert events[-1]["usage"] == {"prompt_tokens": 1, "completion_tokens": 6}
            assert not plain.bodies
            [asked] = good.bodies
            assert asked["messages"][1:] == [{"role": "assistant", "content": "0 1 "}]
            assert asked["max_tokens"] == 4
            assert asked["add_generation_prompt"] is False
            assert system.outcomes == {**system.outcomes, "completed": 1, "failed": 0}
            system.assert_empty()


async def test_what_is_more_than_text_is_not_gone_on_with():
    async with serving(trouble="break") as bad, serving() as good:
        section = configured(bad, good, continues=True)
        async with running(num_engines=0, **section) as system:
            body = system.chat(max_tokens=5, response_format={"type": "json_object"})
            reply = await system.client.post(CHAT, json=body)
            assert '"error"' in reply.text
            assert not good.bodies


async def test_the_clients_own_mistake_is_told_to_it_and_to_nobody_else():
    async with (
        serving(trouble="client error") as server,
        serving() as other,
        running(num_engines=0, **configured(server, other)) as system,
    ):
        for _ in range(5):
            reply = await system.client.post(CHAT, json=system.chat())
            assert reply.status_code == 400
            assert reply.json()["error"]["message"] == "No such field"
        assert breaker(system).state is BreakerState.CLOSED
        assert not other.bodies


async def test_a_refused_request_goes_elsewhere_and_the_budget_learns():
    async with (
        serving(rpm=1) as small,
        serving(name="other") as other,
        running(num_engines=0, **configured(small, other)) as system,
    ):
        replies = [await system.client.post(CHAT, json=system.chat(max_tokens=1)) for _ in range(5)]
        assert {reply.status_code for reply in replies} == {200}
        assert small.num_refused == 0  # its first reply told the limit
        assert small.num_taken == 1
        assert len(other.bodies) == 4


async def test_a_client_that_leaves_hangs_up_there():
    async with serving() as server, running(num_engines=0, **configured(server)) as system:
        server.gate.clear()
        task = asyncio.create_task(system.client.post(CHAT, json=system.chat()))
        await system.until(lambda: server.num_open == 1)
        task.cancel()
        await system.until(lambda: server.num_open == 0)
        await system.until(lambda: system.outcomes["reneged"] == 1)
        system.assert_empty()


async def test_a_slow_reader_holds_the_provider_back():
    async with (
        serving(name="x" * 1000) as server,
        running(
            num_engines=0, gateway={"stream_window_bytes": 4096}, **configured(server)
        ) as system,
    ):
        body = system.chat(max_tokens=20_000)
        async with system.client.stream("POST", CHAT, json=body) as slow:
            await asyncio.sleep(0.5)
            (exchange,) = system.gateway.driver.exchanges.values()
            assert sum(map(len, exchange._chunks)) <= 70_000  # one read of the socket more
            num_bytes = sum([len(piece) async for piece in slow.aiter_raw()])
            assert num_bytes > 20_000_000


async def test_keys_are_sent_and_shown_nowhere(monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("TEST_PROVIDER_KEY", "sk-wrong-in-env")
    (tmp_path / "key").write_text("sk-right-in-file\n")
    keys = [
        {"name": "bad", "env": "TEST_PROVIDER_KEY"},
        {"name": "good", "file": str(tmp_path / "key")},
    ]
    async with (
        serving(api_key="sk-right-in-file") as server,
        running(num_engines=0, **configured(server, keys=keys)) as system,
    ):
        reply = await system.client.post(CHAT, json=system.chat(max_tokens=1))
        assert reply.status_code == 200  # by the second key: the first is not accepted
        state = (await system.client.get("/headway/state")).text
        metrics = (await system.client.get("/metrics")).text
        seen = state + metrics + caplog.text + repr(system.gateway.config)
        assert "bad" in state
        assert "sk-right" not in seen
        assert "sk-wrong" not in seen
        key = msgspec.json.decode(state, type=GatewayState).fallback.providers["p0"].keys["bad"]
        assert key.breaker.state is BreakerState.OPEN


def test_a_missing_key_is_named_by_its_setting(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    provider = {"name": "p", "url": "http://x/v1", "models": MODELS}
    from serving.gateway.providers.credentials import read_api_keys

    for key, words in (
        ({"env": "NO_SUCH_KEY"}, "providers.p.keys.default.env"),
        ({"file": "/nowhere"}, "providers.p.keys.default.file"),
    ):
        config = parse({"providers": [{**provider, "keys": [key]}]})
        with pytest.raises(ConfigError, match=words):
            read_api_keys(config.providers[0])
    for bad, words in (
        ({**provider, "url": None}, "url"),
        ({**provider, "keys": [{}, {}]}, "name of its own"),
        ({**provider, "keys": [{"env": "A", "file": "/b"}]}, "only one of them"),
        ({**provider, "price": 1}, "unknown key"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse({"providers": [bad]})


async def test_models_of_providers_are_listed_and_served():
    async with serving(name="far") as server:
        section = configured(server, models={"big": MODEL})
        async with running(**section) as system:
            models = (await system.client.get("/v1/models")).json()["data"]
            assert [model["id"] for model in models] == ["fake-model", "big"]
            reply = await system.client.post(CHAT, json=system.chat(model="big", max_tokens=1))
            assert texts(reply) == "far "
            reply = await system.client.post(CHAT, json=system.chat(model="small"))
            assert reply.status_code == 404


async def test_providers_and_budgets_change_without_dropping_a_stream():
    async with (
        serving(name="old") as old,
        serving(name="new") as new,
        running(num_engines=0, **configured(old)) as system,
    ):
        old.gate.clear()
        task = asyncio.create_task(system.client.post(CHAT, json=system.chat(max_tokens=2)))
        await system.until(lambda: old.num_open == 1)
        changed = configured(old, new, keys=[{"rpm": 1}])
        system.gateway._use_config(parse(changed))
        # The open stream counts under the new limit; the next goes to the new provider.
        reply = await system.client.post(CHAT, json=system.chat(max_tokens=1))
        assert texts(reply) == "new "
        changed["providers"].pop(0)
        system.gateway._use_config(parse(changed))
        old.gate.set()
        assert texts(await task) == "old old "
        system.assert_empty()


async def test_a_broken_change_changes_nothing(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    async with (
        serving(name="far") as server,
        running(num_engines=0, **configured(server)) as system,
    ):
        with pytest.raises(ConfigError):
            system.gateway._use_config(parse(configured(server, keys=[{"env": "NO_SUCH_KEY"}])))
        reply = await system.client.post(CHAT, json=system.chat(max_tokens=1))
        assert texts(reply) == "far "
