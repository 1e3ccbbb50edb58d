"""What a request costs its tenant, however it ends."""

import asyncio
import contextlib
import json

import pytest

from router import Router, Usage
from tests.serving.gateway.tenants.office import Office
from tests.support.provider_server import configured, serving
from tests.support.running_gateway import CHAT

LIMITS = {"acme": {"tokens_per_min": 6000, "requests_per_min": 60}}
# Some refill while a test runs, 100 tokens and one request a second.
SLACK = 300


@pytest.fixture
def office(tmp_path):
    return Office(tmp_path)


def spent(system) -> float:
    """Tokens that are gone from the tenant's minute."""
    return (
        6000
        - system.gateway.tenants.state(asyncio.get_running_loop().time())
        .by_name["acme"]
        .remaining["tokens"]
    )


def counted(system) -> tuple[int, int]:
    """Prompt and output tokens in the tenant's usage."""
    usage = system.gateway.tenants.usage()["acme"]
    return usage.num_prompt_tokens, usage.num_output_tokens


async def hang_up_after(system, headers, num_tokens: int, path: str = CHAT, **fields) -> None:
    """Read a stream up to some token, and leave."""
    [engine] = system.engines
    engine.closes_at = engine.num_steps + num_tokens
    body = system.chat(max_tokens=1000, **fields)
    async with system.client.stream("POST", path, json=body, headers=headers) as reply:
        assert reply.status_code == 200
        seen = 0
        async for line in reply.aiter_lines():
            seen += line.startswith("data: ")
            if seen == num_tokens:
                break
    await system.until(lambda: not system.gateway.driver.exchanges)
    engine.gate.set()


def note_usage(router: Router) -> list[Usage]:
    """What a router is told of requests whose clients left."""
    told: list[Usage] = []
    on_cancel = router.on_cancel

    def noting(request_id: str, now_s: float, usage: Usage | None = None):
        told.append(usage)
        return on_cancel(request_id, now_s, usage)

    router.on_cancel = noting
    return told


class TestWhoHangsUp:
    async def test_pays_for_what_was_generated_until_then(self, office):
        headers = office.hire("acme")
        async with office.running(LIMITS, num_engines=1) as system:
            told = note_usage(system.gateway.router)
            await hang_up_after(system, headers, 900)
            assert counted(system)[1] == 900
            assert [usage.num_output_tokens for usage in told] == [900]  # its share, too
            assert 900 <= spent(system) + SLACK / 3 <= 900 + SLACK
            system.assert_empty()

    async def test_gets_no_more_than_the_limit_by_it(self, office):
        """Again and again, as fast as it goes: then there is a 429."""
        headers = office.hire("acme")
        async with office.running(LIMITS, num_engines=1) as system:
            replies = 0
            with contextlib.suppress(AssertionError):
                for _ in range(20):
                    await hang_up_after(system, headers, 900)
                    replies += 1
            assert 6 <= replies <= 8
            body = system.chat(max_tokens=1000)
            reply = await system.client.post(CHAT, json=body, headers=headers)
            assert reply.status_code == 429

    async def test_pays_for_the_prompt_once_an_engine_has_it(self, office):
        headers = office.hire("acme")
        async with office.running(LIMITS, num_engines=1) as system:
            system.engines[0].gate.clear()
            body = system.chat(messages=[{"role": "user", "content": "word " * 1600}])
            asking = asyncio.create_task(system.client.post(CHAT, json=body, headers=headers))
            await system.until(lambda: system.num_engine_streams == 1)
            asking.cancel()
            await system.until(lambda: not system.gateway.driver.exchanges)
            num_prompt_tokens, num_output_tokens = counted(system)
            assert num_prompt_tokens == pytest.approx(2000, rel=0.05)
            assert num_output_tokens == 0
            assert spent(system) == pytest.approx(2000, rel=0.1)

    async def test_pays_nothing_while_it_is_held(self, office):
        headers = office.hire("acme")
        async with office.running(LIMITS, num_engines=0) as system:
            asking = asyncio.create_task(
                system.client.post(CHAT, json=system.chat(), headers=headers)
            )
            await system.until(lambda: system.gateway.state().held.num_requests == 1)
            asking.cancel()
            await system.until(lambda: not system.gateway.driver.exchanges)
            assert counted(system) == (0, 0)
            assert spent(system) == 0

    async def test_pays_where_no_reply_can_be_resumed_either(self, office):
        headers = office.hire("acme")
        async with office.running(LIMITS, num_engines=1) as system:
            await hang_up_after(system, headers, 900, "/v1/responses", input="hi")
            assert counted(system)[1] == 900

    async def test_pays_what_was_reserved_where_nobody_counted(self, office):
        """As by an engine of somebody else's, or past the bound of all records."""
        headers = office.hire("acme")
        gateway = {"max_record_bytes": 0}
        async with office.running(LIMITS, num_engines=1, gateway=gateway) as system:
            await hang_up_after(system, headers, 900)
            # The mean, until it is known; some of it has come back by the time that it is read.
            assert spent(system) == pytest.approx(256, rel=0.5)

    async def test_at_the_end_pays_all(self, office):
        """With `[DONE]`, before the engine has told what the reply took."""
        headers = office.hire("acme")
        async with office.running(LIMITS, num_engines=1) as system:
            [engine] = system.engines
            engine.chunk, engine.closes_at = b"data: [DONE]\n\n", 1
            body = system.chat(max_tokens=2)
            async with system.client.stream("POST", CHAT, json=body, headers=headers) as reply:
                async for line in reply.aiter_lines():
                    if line == "data: [DONE]":
                        break
            await asyncio.sleep(0.1)
            state = system.gateway.tenants.state(0.0).by_name["acme"]
            assert state.num_concurrent == 1  # the engine is not done
            engine.gate.set()
            await system.until(lambda: not system.gateway.driver.exchanges)
            assert system.gateway.tenants.state(0.0).by_name["acme"].num_concurrent == 0
            assert counted(system)[1] == 2

    async def test_leaves_the_rest_to_be_paid_by_who_reads_on(self, office):
        """Of the same tenant: else the second of two would read for nothing."""
        headers = office.hire("acme")
        async with office.running(LIMITS, num_engines=1, cache={"enabled": True}) as system:
            [engine] = system.engines
            engine.gate.clear()
            body = system.chat(max_tokens=900, temperature=0)
            leader = asyncio.create_task(system.client.post(CHAT, json=body, headers=headers))
            await system.until(lambda: system.num_engine_streams == 1)
            joiner = asyncio.create_task(system.client.post(CHAT, json=body, headers=headers))
            await system.until(lambda: system.gateway.cache.num_by_verdict["join"] == 1)
            leader.cancel()
            await asyncio.sleep(0.1)
            engine.gate.set()
            assert (await joiner).text.count("data: {}") == 900
            assert counted(system)[1] == 900


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        "fields",
        [
            {"max_tokens": -10_000},
            {"max_tokens": -(10**9)},
            {"n": -100},
            {"n": 10**308},
            {"max_tokens": 10**15},
            {"messages": []},
            {"model": "nowhere"},
        ],
    )
    async def test_costs_nothing(self, office, fields):
        headers = office.hire("acme")
        async with office.running(LIMITS, num_engines=1) as system:
            for _ in range(3):
                reply = await system.client.post(CHAT, json=system.chat(**fields), headers=headers)
                assert reply.status_code in (400, 404)
            state = system.gateway.tenants.state(0.0).by_name["acme"]
            assert state.remaining == {"tokens": 6000, "requests": 60}
            assert (state.num_requests, state.num_concurrent) == (0, 0)
            assert not system.engines[0].num_started

    async def test_by_vllm_costs_a_request_and_no_tokens(self, office):
        headers = office.hire("acme")
        async with office.running(LIMITS, num_engines=1) as system:
            [engine] = system.engines
            engine.status = 400
            reply = await system.client.post(CHAT, json=system.chat(), headers=headers)
            assert reply.status_code == 400
            await system.until(lambda: not system.gateway.driver.exchanges)
            state = system.gateway.tenants.state(0.0).by_name["acme"]
            assert (state.num_requests, state.remaining["tokens"]) == (1, 6000)

    async def test_by_failing_engines_costs_no_tokens(self, office):
        headers = office.hire("acme")
        router = {"max_attempts": 1}
        async with office.running(LIMITS, num_engines=2, router=router) as system:

            async def fail(scope, receive, send):
                raise ValueError("of the engine")

            for engine in system.engines:
                engine.app = fail
            reply = await system.client.post(CHAT, json=system.chat(), headers=headers)
            assert reply.status_code == 502
            assert spent(system) == 0
            assert counted(system) == (0, 0)


class TestLists:
    async def test_are_booked_as_what_they_are(self, office):
        """300,000 token ids and 100 answers do not pass for one prompt of the model's length."""
        headers = office.hire("acme")
        async with office.running(LIMITS, num_engines=1) as system:
            body = {"model": "fake-model", "prompt": [list(range(3000))] * 100, "max_tokens": 5}
            reply = await system.client.post("/v1/completions", json=body, headers=headers)
            assert reply.status_code == 429
            assert "300000 prompt tokens" in reply.json()["error"]["message"]
            engine = system.engines[0]
            engine.gate.clear()
            body["prompt"] = [list(range(30))] * 100
            asking = asyncio.create_task(
                system.client.post("/v1/completions", json=body, headers=headers)
            )
            await system.until(lambda: system.num_engine_streams == 1)
            assert spent(system) == pytest.approx(3000 + 100 * 5, abs=SLACK)
            engine.gate.set()
            await asking


class TestProviders:
    async def test_whoever_leaves_one_pays_what_was_reserved(self, office):
        """What it has generated until then is not known exactly, and it is not nothing."""
        headers = office.hire("acme")
        async with (
            serving(name="far", token_s=0.01) as server,
            office.running(LIMITS, num_engines=0, **configured(server)) as system,
        ):
            body = system.chat(max_tokens=200)
            async with system.client.stream("POST", CHAT, json=body, headers=headers) as reply:
                await anext(reply.aiter_lines())
            await system.until(lambda: not system.gateway.driver.exchanges)
            assert 190 <= spent(system) <= 210

    async def test_a_reply_whose_usage_is_not_told_costs_what_was_reserved(self, office):
        headers = office.hire("acme")
        async with (
            serving(name="far") as server,
            office.running(LIMITS, num_engines=0, **configured(server, asks_usage=False)) as system,
        ):
            body = system.chat(max_tokens=200)
            reply = await system.client.post(CHAT, json=body, headers=headers)
            assert reply.status_code == 200
            assert 190 <= spent(system) <= 210

    async def test_what_vllm_would_convert_is_converted_for_them(self, office):
        headers = office.hire("acme")
        async with (
            serving(name="far") as server,
            office.running(LIMITS, num_engines=0, **configured(server)) as system,
        ):
            body = system.chat(max_tokens="3", stream="yes", n=True)
            content = json.dumps({**body, "top_p": float("nan")})  # which only Python can read
            reply = await system.client.post(CHAT, content=content, headers=headers)
            assert reply.text.count("far ") == 3
            [sent] = server.bodies
            assert (sent["max_tokens"], sent["stream"], sent["n"]) == (3, True, 1)
            assert "cache_salt" not in sent  # engines' alone
