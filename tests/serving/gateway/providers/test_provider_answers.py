"""What counts as an answer of a provider, and what as the end of one? Real HTTP on both sides."""

import time

import pytest

from router.resilience.breaker import BreakerState
from tests.serving.gateway.providers.replies import (
    DONE,
    ERROR,
    GOOD,
    GOOD_WHOLE,
    ONE_FAILURE_OPENS,
    PAGE,
    ROLE,
    delta,
    event,
)
from tests.support.provider_server import Script, breaker, configured, serving
from tests.support.running_gateway import CHAT, running


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
