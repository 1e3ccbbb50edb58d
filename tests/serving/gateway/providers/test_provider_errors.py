"""Whose fault is an error of a provider, and what follows? Real HTTP on both sides."""

import asyncio
import json

import pytest

from router.resilience.breaker import BreakerState
from serving.gateway.providers.event_reader import ReplyReader
from serving.gateway.providers.rate_headers import rate_report
from tests.serving.gateway.providers.replies import GOOD, ONE_FAILURE_OPENS, ROLE, event
from tests.support.provider_server import Script, breaker, budget, configured, serving
from tests.support.running_gateway import CHAT, running


def out_of_money(message: str = "no", **fields) -> bytes:
    return json.dumps({"error": {"message": message, **fields}}).encode()


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (402, b""),
        (402, out_of_money("Insufficient Balance")),
        (400, out_of_money("Budget has been exceeded! Current cost: 2", code="400")),
        (400, out_of_money("x", type="budget_exceeded")),
        (400, out_of_money("Your credit balance is too low to access the Anthropic API.")),
        (400, out_of_money("budget exhausted")),
        (403, out_of_money("x", code="insufficient_user_quota")),
        (429, out_of_money("x", type="insufficient_quota")),
        (429, out_of_money("x", code="exceeded_current_quota_error")),
        (200, out_of_money("x", code=402)),
        (200, out_of_money("x", code="insufficient_quota")),
        (200, b"data: " + out_of_money("x", code="insufficient_quota") + b"\n\n"),
    ],
)
async def test_a_key_without_money_is_put_aside(status, body):
    script = Script(body, status=status)
    async with (
        serving(script=script) as poor,
        serving(script=Script(GOOD)) as rich,
        running(num_engines=0, **configured(poor, rich)) as system,
    ):
        for _ in range(3):
            reply = await system.client.post(CHAT, json=system.chat())
            assert reply.content == GOOD
        assert len(poor.bodies) == 1
        assert breaker(system).state is BreakerState.OPEN


@pytest.mark.parametrize(
    "body",
    [
        out_of_money("Unknown field: 'budget exhausted'", code="invalid_value"),
        out_of_money("insufficient_quota is no field", type="invalid_request_error"),
        b'{"detail": [{"msg": "x", "input": {"error": {"code": "insufficient_quota"}}}]}',
    ],
)
async def test_a_client_cannot_put_a_key_aside_by_what_it_says(body):
    """What an error says back is the client's own."""
    script = Script(body, status=400, content_type="application/json")
    async with (
        serving(script=script) as server,
        running(num_engines=0, **configured(server)) as system,
    ):
        for _ in range(3):
            reply = await system.client.post(CHAT, json=system.chat())
            assert (reply.status_code, reply.content) == (400, body)
        assert breaker(system).state is BreakerState.CLOSED


async def test_an_input_that_was_flagged_is_not_the_keys_fault():
    body = out_of_money("flagged", code=403, metadata={"reasons": ["violence"]})
    script = Script(body, status=403, content_type="application/json")
    async with (
        serving(script=script) as server,
        running(num_engines=0, **configured(server)) as system,
    ):
        reply = await system.client.post(CHAT, json=system.chat())
        assert (reply.status_code, reply.content) == (403, body)
        assert breaker(system).state is BreakerState.CLOSED


@pytest.mark.parametrize(
    "body",
    [out_of_money("slow down", code=429), event({"error": {"code": "rate_limit_exceeded"}})],
)
async def test_a_429_in_words_pauses_the_key_and_leaves_its_breaker(body):
    async with (
        serving(script=Script(body)) as busy,
        serving(script=Script(GOOD)) as other,
        running(num_engines=0, **configured(busy, other, **ONE_FAILURE_OPENS)) as system,
    ):
        reply = await system.client.post(CHAT, json=system.chat())
        assert reply.content == GOOD
        assert budget(system).num_refused == 1
        assert breaker(system).state is BreakerState.CLOSED


@pytest.mark.parametrize("number", [-(10**6), 10**30, 10**400, 1.5])
def test_usage_that_cannot_be_is_none(number):
    """What a service says is counted against tenants and budgets."""
    usage = {"prompt_tokens": 1, "completion_tokens": number}
    reader = ReplyReader(stream=False, hides_usage=False)
    choices = [{"index": 0, "message": {"content": "x"}, "finish_reason": "stop"}]
    reader.feed(json.dumps({"choices": choices, "usage": usage}).encode())
    assert reader.flush()
    assert reader.usage is None


@pytest.mark.parametrize("text", ["9" * 5000, "-5", "1e3", "\u00b2", ""])
def test_limits_that_are_no_numbers_are_none(text):
    report = rate_report({"x-ratelimit-limit-tokens": text, "x-ratelimit-limit-requests": "60"})
    assert (report.limit_tokens, report.limit_requests) == (None, 60)


@pytest.mark.parametrize(
    "poison",
    [
        Script(b'{"error": {"message": "x"}}', status=500),
        Script(b"Internal Server Error", status=500, content_type="text/plain"),
        Script(b'{"error": {"message": "x", "code": 500}}'),
        Script(ROLE, event({"error": {"message": "x", "type": "InternalServerError"}})),
    ],
)
async def test_a_request_that_no_provider_can_answer_is_held_against_none(poison):
    async with (
        serving(script=poison) as first,
        serving(script=poison) as second,
        running(num_engines=0, **configured(first, second, **ONE_FAILURE_OPENS)) as system,
    ):
        for _ in range(5):
            reply = await system.client.post(CHAT, json=system.chat())
            assert reply.status_code == 502
        assert breaker(system, "p0").state is BreakerState.CLOSED
        assert breaker(system, "p1").state is BreakerState.CLOSED
        first.script = Script(GOOD)
        reply = await system.client.post(CHAT, json=system.chat())
        assert (reply.content, reply.headers["x-headway-provider"]) == (GOOD, "p0")
        system.assert_empty()


@pytest.mark.parametrize("status", [500, 502, 503])
async def test_a_failure_that_another_provider_has_not_is_the_first_ones(status):
    async with (
        serving(script=Script(b"", status=status)) as bad,
        serving(script=Script(GOOD)) as good,
        running(num_engines=0, **configured(bad, good, **ONE_FAILURE_OPENS)) as system,
    ):
        assert (await system.client.post(CHAT, json=system.chat())).content == GOOD
        assert breaker(system).state is BreakerState.OPEN


async def test_a_provider_that_is_down_says_so_itself():
    """503 is what a service says of itself, whatever it was asked."""
    async with (
        serving(script=Script(b"", status=503)) as down,
        running(num_engines=0, **configured(down, **ONE_FAILURE_OPENS)) as system,
    ):
        task = asyncio.create_task(system.client.post(CHAT, json=system.chat()))
        await system.until(lambda: down.bodies)
        await system.until(lambda: breaker(system).state is BreakerState.OPEN)
        task.cancel()
