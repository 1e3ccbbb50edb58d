"""What counts as an answer of a provider, and what as the end of one? Real HTTP on both sides."""

import json
import time

import pytest

from router.resilience.breaker import BreakerState
from serving.gateway.providers.event_reader import ReplyReader
from serving.gateway.providers.rate_headers import rate_report
from tests.support.provider_server import Script, breaker, budget, configured, serving
from tests.support.running_gateway import CHAT, running


def event(chunk: dict | list) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def delta(content: str | None = None, finish: str | None = None, index: int = 0, **said) -> bytes:
    said |= {} if content is None else {"content": content}
    choice = {"index": index, "delta": said, "finish_reason": finish}
    return event({"id": "c", "object": "chat.completion.chunk", "choices": [choice]})


ROLE = delta("", role="assistant")
ERROR = event({"error": {"message": "overloaded", "type": "server_error"}})
ONE_FAILURE_OPENS = {"breaker": {"max_consecutive_failures": 1}}
DONE = b"data: [DONE]\n\n"
PAGE = b"<!doctype html>\n\n<title>502 Bad Gateway</title>\n\n<p>nginx</p>\n\n"
GOOD = delta("good ", role="assistant") + delta("", "stop") + DONE
GOOD_WHOLE = Script(
    b'{"choices": [{"index": 0, "message": {"content": "good"}, "finish_reason": "stop"}]}',
    content_type="application/json",
)


@pytest.mark.parametrize("end", ["whole", "broken", "error", "done"])
@pytest.mark.parametrize(
    "preface",
    [
        b"",
        b": OPENROUTER PROCESSING\n\n: OPENROUTER PROCESSING\n\n",
        b"event: ping\ndata: {}\n\n",
        event({"type": "ping"}),
        ROLE,
        ROLE.replace(b"\n", b"\r\n"),
        delta(role="assistant") + delta("") + delta(tool_calls=[], reasoning_content=""),
        event({"choices": [], "prompt_filter_results": [{"prompt_index": 0}]}) + ROLE,
        event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 0}}),
    ],
    ids=["nothing", "comments", "ping", "ping type", "role", "crlf", "empty", "filter", "usage"],
)
async def test_a_stream_without_content_has_not_begun(preface, end):
    tail = {"error": ERROR, "done": DONE}.get(end, b"")
    script = Script(preface, tail, "broken" if end == "broken" else "whole")
    await expect_the_next(script)


@pytest.mark.parametrize(
    "body",
    [
        event({"error": "overloaded"}),
        event({"error": {"message": "overloaded"}}) + DONE,
        b"event: error\ndata: " + b'{"message": "overloaded"}\n\n',
        event({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}),
        event({"object": "error", "message": "overloaded", "code": 500}),
        event({"choices": [{"delta": {"content": ""}, "error": {"code": 502}}]}),
        event({"choices": [{"delta": {"content": ""}, "finish_reason": "error"}]}) + DONE,
        b'{"error": {"message": "overloaded"}}',
        b'{"choices": [{"index": 0, "message": {"content": "bad"}, "finish_reason": "stop"}]}',
        PAGE,
        b"data: <html>\n\n",
        ROLE + delta("bad") + ERROR,  # in one piece: nobody has seen the beginning
        delta("bad")[:-20],
    ],
)
async def test_a_stream_that_is_an_error_goes_to_the_next(body):
    await expect_the_next(Script(body))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\n\n \n",
        PAGE,
        b"{}",
        b"[]",
        b"null",
        b'{"error": {"message": "overloaded"}}',
        b'{"error": "overloaded", "choices": null}',
        b'[{"error": {"message": "overloaded", "status": "UNAVAILABLE"}}]',
        b'{"object": "error", "message": "overloaded"}',
        b'{"choices": [], "usage": {"prompt_tokens": 3}}',
        b'{"choices": [{"index": 0, "error": {"message": "overloaded"}}]}',
        b'{"choices": [{"index": 0, "message": {"content": ""}, "finish_reason": "error"}]}',
        GOOD_WHOLE.body[:-9],
        delta("bad") + DONE,
    ],
)
async def test_a_whole_reply_that_is_no_answer_goes_to_the_next(body):
    bad = Script(body, content_type="application/json")
    async with (
        serving(script=bad) as first,
        serving(script=GOOD_WHOLE) as second,
        running(num_engines=0, **configured(first, second)) as system,
    ):
        reply = await system.client.post(CHAT, json=system.chat(stream="false"))
        assert (reply.status_code, reply.content) == (200, GOOD_WHOLE.body)
        assert second.bodies[0]["stream"] is False
        assert reply.headers["x-headway-provider"] == "p1"
        assert system.outcomes == {**system.outcomes, "completed": 1, "failed": 0}
        system.assert_empty()


async def expect_the_next(bad: Script) -> None:
    """The first provider answers so; the client sees the second one's reply and no other."""
    async with (
        serving(script=bad) as first,
        serving(script=Script(GOOD)) as second,
        running(num_engines=0, **configured(first, second)) as system,
    ):
        reply = await system.client.post(CHAT, json=system.chat())
        assert (reply.status_code, reply.content) == (200, GOOD)
        assert reply.headers["x-headway-provider"] == "p1"
        assert len(first.bodies) == len(second.bodies) == 1
        assert system.outcomes == {**system.outcomes, "completed": 1, "failed": 0}
        system.assert_empty()


@pytest.mark.parametrize(
    ("tail", "end"),
    [
        (b"", "whole"),
        (b"", "broken"),
        (b"", "open"),
        (b"", "comments"),
        (DONE, "whole"),
        (DONE, "broken"),
        (DONE, "open"),
        (DONE, "comments"),
        (DONE[:-1], "whole"),
        (DONE[:-2], "broken"),
        (DONE[:-2], "open"),
        (ERROR, "whole"),
        (ERROR + DONE, "open"),
        (PAGE, "whole"),
        (delta("cut")[:-20], "broken"),
    ],
)
async def test_an_answer_that_has_finished_is_whole(tail, end):
    """A client asks no more once it has seen how its one choice ended: it gets `[DONE]`."""
    answer = ROLE + delta("all") + delta("", "stop")
    script = Script(answer, tail, end)
    async with (
        serving(script=script) as server,
        running(
            num_engines=0, **configured(server, stall_timeout_s=0.4, **ONE_FAILURE_OPENS)
        ) as system,
    ):
        start_s = time.monotonic()
        reply = await system.client.post(CHAT, json=system.chat())
        assert time.monotonic() - start_s < 5.0
        seen = reply.content.replace(b": ping\n\n", b"").replace(PAGE, b"")
        assert seen == answer + DONE
        assert system.outcomes == {**system.outcomes, "completed": 1, "failed": 0}
        assert breaker(system).state is BreakerState.CLOSED
        system.assert_empty()


async def test_the_usage_of_a_reply_whose_connection_stays_open_counts():
    usage = event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}})
    script = Script(delta("all", "stop"), usage + DONE, "open")
    async with (
        serving(script=script) as server,
        running(num_engines=0, **configured(server, price_output=1e6)) as system,
    ):
        await system.client.post(CHAT, json=system.chat())
        await system.until(lambda: system.outcomes["completed"] == 1)
        assert system.gateway.state().fallback.providers["p0"].cost == 4


@pytest.mark.parametrize("tail", [ERROR, ERROR + DONE, DONE[:9]])
async def test_an_error_after_content_is_told_and_counted(tail):
    """It is no end of an answer, whatever the provider sends after it."""
    async with (
        serving(script=Script(delta("some"), tail)) as server,
        serving(script=Script(GOOD)) as other,
        running(num_engines=0, **configured(server, other)) as system,
    ):
        reply = await system.client.post(CHAT, json=system.chat())
        assert reply.content.startswith(delta("some"))
        assert b"[DONE]" not in reply.content
        assert b'"error"' in reply.content
        assert not other.bodies
        assert system.outcomes["failed"] == 1


async def test_every_choice_has_to_finish():
    one = delta("a", "stop") + delta("b", index=1)
    async with (
        serving(script=Script(one)) as server,
        running(num_engines=0, **configured(server)) as system,
    ):
        reply = await system.client.post(CHAT, json=system.chat(n=2))
        assert b"[DONE]" not in reply.content
        assert b"broke off" in reply.content
        server.script = Script(one + delta("", "stop", index=1))
        reply = await system.client.post(CHAT, json=system.chat(n=2))
        assert reply.content == server.script.body + DONE
        ended = event({"choices": [{"index": 0, "text": "a", "finish_reason": "stop"}]})
        server.script = Script(ended)
        body = {"model": "fake-model", "prompt": ["x", "y"], "stream": True}
        reply = await system.client.post("/v1/completions", json=body)
        assert b"broke off" in reply.content
        reply = await system.client.post("/v1/completions", json={**body, "prompt": [1, 2]})
        assert reply.content == ended + DONE


CREATED = event({"type": "response.created", "response": {"usage": None, "error": None}})
TEXT = event({"type": "response.output_text.delta", "delta": "hi"})


@pytest.mark.parametrize(
    ("body", "is_answer"),
    [
        (CREATED, False),
        (CREATED + event({"type": "response.output_item.added", "item": {}}), False),
        (CREATED + event({"type": "response.failed", "response": {"error": {"code": "x"}}}), False),
        (CREATED + event({"type": "error", "code": "server_error", "message": "x"}), False),
        (CREATED + TEXT + event({"type": "response.completed", "response": {}}), True),
        (CREATED + TEXT + event({"type": "response.incomplete", "response": {}}), True),
    ],
)
async def test_a_response_ends_by_its_last_event(body, is_answer):
    """Not by its first, which tells of usage as well."""
    good = CREATED + TEXT + event({"type": "response.completed", "response": {"id": "good"}})
    async with (
        serving(script=Script(body)) as first,
        serving(script=Script(good)) as second,
        running(num_engines=0, **configured(first, second)) as system,
    ):
        asked = {"model": "fake-model", "input": "hi", "stream": True}
        reply = await system.client.post("/v1/responses", json=asked)
        assert reply.content == (body if is_answer else good)
        assert system.outcomes == {**system.outcomes, "completed": 1, "failed": 0}


async def test_comments_do_not_hide_that_a_provider_hangs():
    """They come from another part of it than tokens do."""
    async with (
        serving(script=Script(ROLE, end="comments")) as silent,
        serving(script=Script(delta("some"), end="comments")) as stalled,
    ):
        fields = {"first_token_timeout_s": 0.3, "stall_timeout_s": 0.3}
        async with running(num_engines=0, **configured(silent, stalled, **fields)) as system:
            reply = await system.client.post(CHAT, json=system.chat())
            assert b'"some"' in reply.content
            assert b"it stalled" in reply.content
            assert system.outcomes["failed"] == 1


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
