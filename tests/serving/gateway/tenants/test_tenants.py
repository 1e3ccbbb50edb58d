"""Keys and limits over real HTTP."""

import asyncio
import datetime
import json
import logging
import statistics
import time

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from serving.config import ConfigError, parse
from serving.gateway.tenants.keys import KeyRing, KeysFile, make_key, read_keys
from tests.serving.gateway.tenants.office import Office, bearer
from tests.support.running_gateway import CHAT, running


@pytest.fixture
def office(tmp_path):
    return Office(tmp_path)


async def test_without_a_valid_key_nothing_is_answered(office):
    good = office.hire("acme")["authorization"]
    async with office.running() as system:
        for header in (
            None,
            "",
            "Bearer",
            "Bearer x",
            good[:-1],
            good[:-1] + ("0" if good[-1] != "0" else "1"),
            good.replace("Bearer", "Basic"),
            "Bearer hw-000000000000-" + 64 * "0",
            "Bearer \xff\xfe",
        ):
            headers = {} if header is None else {"authorization": header.encode("latin-1")}
            reply = await system.client.post(CHAT, json=system.chat(), headers=headers)
            assert reply.status_code == 401
            assert reply.headers["www-authenticate"] == "Bearer"
            error = reply.json()["error"]
            assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
            for path in ("/v1/models", "/headway/state", "/headway/usage", "/metrics"):
                assert (await system.client.get(path, headers=headers)).status_code == 401
            for path in ("/headway/policy", "/headway/reload"):
                assert (await system.client.post(path, headers=headers)).status_code == 401
        assert not any(engine.num_started for engine in system.engines)
        assert (await system.client.get("/health")).status_code == 200
        headers = {"authorization": good}
        reply = await system.client.post(CHAT, json=system.chat(max_tokens=3), headers=headers)
        assert reply.status_code == 200
        assert reply.text.count("data: {}") == 3


async def test_openais_own_client(office):
    from openai import AsyncOpenAI, AuthenticationError, RateLimitError

    key = office.hire("acme")["authorization"].removeprefix("Bearer ")
    async with office.running({"acme": {"requests_per_min": 2}}) as system:
        url = f"{system.client.base_url}/v1"
        async with AsyncOpenAI(base_url=url, api_key=key, max_retries=0) as client:
            assert [model.id async for model in client.models.list()] == ["fake-model"]
            for _ in range(2):
                await client.chat.completions.with_raw_response.create(
                    model="fake-model", messages=[{"role": "user", "content": "hi"}], stream=True
                )
            with pytest.raises(RateLimitError) as caught:
                await client.chat.completions.create(
                    model="fake-model", messages=[{"role": "user", "content": "hi"}], stream=True
                )
            assert caught.value.code == "rate_limit_exceeded"
        async with AsyncOpenAI(base_url=url, api_key="sk-wrong", max_retries=0) as client:
            with pytest.raises(AuthenticationError):
                await client.models.list()


async def test_only_admins_see_and_change_the_server(office):
    user, admin = office.hire("acme"), office.hire("ops", admin=True)
    async with office.running() as system:
        for method, path in (
            ("GET", "/headway/state"),
            ("GET", "/headway/state/schema"),
            ("GET", "/metrics"),
            ("POST", "/headway/policy"),
            ("POST", "/headway/reload"),
        ):
            body = {"policy": "round_robin"}
            refused = await system.client.request(method, path, json=body, headers=user)
            assert refused.status_code == 403
            assert "admin" in refused.json()["error"]["message"]
            reply = await system.client.request(method, path, json=body, headers=admin)
            assert reply.status_code == 200


async def test_open_metrics_need_no_key(office):
    auth = {"keys_file": str(office.path), "open_metrics": True}
    async with running(auth=auth) as system:
        assert (await system.client.get("/metrics")).status_code == 200
        assert (await system.client.get("/headway/state")).status_code == 401


async def test_over_quota_one_is_told_and_others_are_not_touched(office):
    greedy, modest = office.hire("greedy"), office.hire("modest")
    tenants = {"greedy": {"requests_per_min": 6, "tokens_per_min": 100_000}}
    async with office.running(tenants) as system:
        replies = [
            await system.client.post(CHAT, json=system.chat(max_tokens=1), headers=greedy)
            for _ in range(8)
        ]
        assert [reply.status_code for reply in replies] == [200] * 6 + [429] * 2
        first, refused = replies[0].headers, replies[-1]
        assert first["x-ratelimit-limit-requests"] == "6"
        assert first["x-ratelimit-remaining-requests"] == "5"
        assert first["x-ratelimit-limit-tokens"] == "100000"
        assert int(first["x-ratelimit-remaining-tokens"]) > 99_000
        assert first["x-ratelimit-reset-requests"].endswith("s")
        assert 1 <= int(refused.headers["retry-after"]) <= 10
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        others = await asyncio.gather(
            *(system.client.post(CHAT, json=system.chat(), headers=modest) for _ in range(50))
        )
        assert {reply.status_code for reply in others} == {200}
        assert "x-ratelimit-limit-requests" not in others[0].headers
        usage = system.gateway.tenants.usage()
        assert (usage["greedy"].num_requests, usage["greedy"].num_refused) == (6, 2)
        assert usage["modest"].num_requests == 50


async def test_a_prompt_that_can_never_pass_gets_no_retry_after(office):
    headers = office.hire("acme")
    async with office.running({"acme": {"tokens_per_min": 50}}) as system:
        body = system.chat(messages=[{"role": "user", "content": "word " * 500}])
        reply = await system.client.post(CHAT, json=body, headers=headers)
        assert reply.status_code == 429
        assert "retry-after" not in reply.headers
        assert "never" in reply.json()["error"]["message"]


async def test_concurrency_counts_what_runs_and_frees_what_left(office):
    headers = office.hire("acme")
    async with office.running({"acme": {"max_concurrent_requests": 1}}) as system:
        for engine in system.engines:
            engine.gate.clear()

        async def ask():
            return await system.client.post(CHAT, json=system.chat(), headers=headers)

        running_one = asyncio.create_task(ask())
        await system.until(lambda: system.num_engine_streams == 1)
        assert (await ask()).status_code == 429
        running_one.cancel()
        await system.until(lambda: system.num_engine_streams == 0)
        for engine in system.engines:
            engine.gate.set()
        assert (await ask()).status_code == 200


async def test_what_no_engine_ran_costs_no_tokens(office):
    headers = office.hire("acme")
    async with office.running(
        {"acme": {"tokens_per_min": 6000}}, num_engines=0, router={"max_held_requests": 0}
    ) as system:
        body = system.chat(messages=[{"role": "user", "content": "word " * 2000}])
        for _ in range(5):
            reply = await system.client.post(CHAT, json=body, headers=headers)
            assert reply.json()["error"]["code"] == "queue_full"


async def test_models_and_classes(office):
    headers = office.hire("acme")
    tenants = {"acme": {"models": ["other"], "classes": ["batch", "standard"]}}
    async with office.running(tenants) as system:
        assert (await system.client.get("/v1/models", headers=headers)).json()["data"] == []
        reply = await system.client.post(CHAT, json=system.chat(), headers=headers)
        assert reply.status_code == 404
        error = reply.json()["error"]
        assert (error["type"], error["param"], error["code"]) == ("NotFoundError", "model", 404)
    tenants = {"acme": {"classes": ["batch"]}}
    async with office.running(tenants) as system:
        reply = await system.client.post(CHAT, json=system.chat(), headers=headers)
        assert reply.status_code == 200  # batch is its default, then
        reply = await system.client.post(
            CHAT, json=system.chat(), headers={**headers, "x-headway-class": "interactive"}
        )
        assert reply.status_code == 403
        body = system.chat(priority_class="interactive")
        reply = await system.client.post(CHAT, json=body, headers=headers)
        assert reply.status_code == 403


async def test_keys_come_and_go_while_serving(office):
    """Rotation: the new one works beside the old, then the old is revoked; no stream is cut."""
    old = office.hire("acme")
    async with office.running() as system:
        for engine in system.engines:
            engine.gate.clear()
        stream = asyncio.create_task(
            system.client.post(CHAT, json=system.chat(max_tokens=5), headers=old)
        )
        await system.until(lambda: system.num_engine_streams == 1)
        new = office.hire("acme")
        assert (await system.client.get("/v1/models", headers=old)).status_code == 200
        watch = system.gateway.file_watches["auth.keys_file"]
        await system.until(lambda: watch.num_reloads == 1)
        assert (await system.client.get("/v1/models", headers=new)).status_code == 200
        with KeysFile(office.path) as file:
            del file.keys[0]
            file.save()
        await watch.reload()
        assert (await system.client.get("/v1/models", headers=old)).status_code == 401
        assert (await system.client.get("/v1/models", headers=new)).status_code == 200
        office.path.write_text("{broken")
        await watch.reload()
        assert "keys file" in system.gateway.state().files["auth.keys_file"].error
        assert (await system.client.get("/v1/models", headers=new)).status_code == 200
        for engine in system.engines:
            engine.gate.set()
        assert (await stream).text.count("data: {}") == 5


async def test_limits_change_while_serving(office, tmp_path):
    headers, admin = office.hire("acme"), office.hire("ops", admin=True)
    config_file = tmp_path / "config.yaml"

    def write(**tenant):
        args = {"auth": {"keys_file": "keys.json"}, "tenants": {"acme": tenant}}
        config_file.write_text(yaml.safe_dump({"applications": [{"args": args}]}))

    write(requests_per_min=1)
    async with office.running(
        {"acme": {"requests_per_min": 1}}, watch_file=str(config_file)
    ) as system:

        async def ask():
            return (await system.client.post(CHAT, json=system.chat(), headers=headers)).status_code

        assert [await ask(), await ask()] == [200, 429]
        write(requests_per_min=3)
        reply = await system.client.post("/headway/reload", headers=admin)
        assert reply.json()["watch_file"] == {"num_reloads": 1, "error": None}
        assert [await ask(), await ask(), await ask()] == [200, 200, 429]
        write(requests_per_min=-1)
        reply = await system.client.post("/headway/reload", headers=admin)
        assert "tenants.acme.requests_per_min" in reply.json()["watch_file"]["error"]
        assert await ask() == 429


async def test_an_expired_key_is_wrong(office):
    now = datetime.datetime.now(datetime.UTC)
    past = office.hire("acme", expires=now - datetime.timedelta(seconds=1))
    future = office.hire("acme", expires=now + datetime.timedelta(hours=1))
    async with office.running() as system:
        assert (await system.client.get("/v1/models", headers=past)).status_code == 401
        assert (await system.client.get("/v1/models", headers=future)).status_code == 200


async def test_usage_is_each_ones_own_and_admins_see_all(office):
    one, two = office.hire("one"), office.hire("two")
    admin = office.hire("ops", admin=True)
    async with office.running() as system:
        for headers in (one, two, two):
            await system.client.post(CHAT, json=system.chat(), headers=headers)
        reply = (await system.client.get("/headway/usage", headers=one)).json()["tenants"]
        assert reply.keys() == {"one"}
        assert reply["one"]["num_requests"] == 1
        reply = (await system.client.get("/headway/usage", headers=admin)).json()["tenants"]
        assert reply.keys() == {"one", "two", "ops"}
        assert reply["two"]["num_requests"] == 2
        text = (await system.client.get("/metrics", headers=admin)).text
        samples = {
            sample.labels["tenant"]: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == "headway_tenant_num_requests_total"
        }
        assert samples == {"one": 1.0, "two": 2.0, "ops": 0.0}


async def test_keys_appear_nowhere(office, caplog, capfd):
    """Neither whole nor their secret part, nor their hashes: logs, state, metrics, replies."""
    caplog.set_level(logging.DEBUG)
    headers, admin = office.hire("acme"), office.hire("ops", admin=True)
    wrong = "hw-0123456789ab-" + 64 * "7"
    async with office.running({"acme": {"requests_per_min": 1}}) as system:
        replies = []
        for sent in (headers, headers, bearer(wrong), bearer("Bearer " + wrong)):
            replies.append(await system.client.post(CHAT, json=system.chat(), headers=sent))
            replies.append(await system.client.post(CHAT, content=b"{", headers=sent))
        for path in ("/headway/state", "/headway/usage", "/metrics"):
            replies.append(await system.client.get(path, headers=admin))
        replies.append(await system.client.post("/headway/reload", headers=admin))
        forwarded = json.dumps([engine.bodies for engine in system.engines])
    captured = capfd.readouterr()
    seen = "\n".join(
        [caplog.text, captured.out, captured.err, forwarded]
        + [f"{reply.headers} {reply.text}" for reply in replies]
    )
    assert "acme" in seen
    for text in (*office.texts, wrong):
        assert text.rpartition("-")[2] not in seen
    for key in read_keys(office.path):
        assert key.sha256 not in seen
    stored = office.path.read_text()
    assert not any(text.rpartition("-")[2] in stored for text in office.texts)
    assert office.path.stat().st_mode & 0o077 == 0


def test_a_wrong_key_takes_as_long_whatever_is_wrong():
    """Unknown id, wrong first or last character of the secret: equal medians, within noise."""
    entries = [make_key("acme") for _ in range(1000)]
    ring = KeyRing(key for _, key in entries)
    now = datetime.datetime.now(datetime.UTC)
    text = entries[500][0]
    first = text[:16] + ("0" if text[16] != "0" else "1") + text[17:]
    last = text[:-1] + ("0" if text[-1] != "0" else "1")
    unknown = "hw-" + 12 * "0" + text[15:]
    times_ns: dict[str, list[int]] = {key: [] for key in (first, last, unknown)}
    for _ in range(5000):
        for guess, spent in times_ns.items():
            begin_ns = time.perf_counter_ns()
            assert ring.find(guess, now) is None
            spent.append(time.perf_counter_ns() - begin_ns)
    medians_ns = [statistics.median(spent) for spent in times_ns.values()]
    # Reading on to the first difference of 85 characters would save tens of ns of some 2,000.
    assert max(medians_ns) - min(medians_ns) <= 0.25 * min(medians_ns)
    assert ring.find(text, now) is not None


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"auth": {"keys_file": "keys.json"}}, "auth.keys_file: must be absolute"),
        ({"tenants": {"a": {"weight": 0}}}, "tenants.a.weight"),
        ({"tenants": {"a": {"classes": ["batch"], "default_class": "standard"}}}, "default_class"),
        ({"tenants": {"a": {"rpm": 1}}}, "tenants.a.rpm"),
    ],
)
def test_mistakes_in_the_configuration_are_named(args, words):
    with pytest.raises(ConfigError, match=words):
        parse(args)


async def test_limits_are_divided_among_gateways(office):
    headers = office.hire("acme")
    async with office.running(
        {"acme": {"requests_per_min": 10}}, gateway={"replicas": 2}
    ) as system:
        codes = [
            (await system.client.post(CHAT, json=system.chat(), headers=headers)).status_code
            for _ in range(6)
        ]
        assert codes == [200] * 5 + [429]
