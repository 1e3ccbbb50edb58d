"""Comments on a stream that has not begun, for proxies that cut what is silent."""

import asyncio
import json

import pytest

from tests.support.running_gateway import CHAT, running

COMMENT = ": keep-alive\n\n"
OFTEN = {"keepalive_s": 0.05}


async def _later(system, do) -> None:
    await asyncio.sleep(0.2)
    await do()


async def test_a_held_stream_is_kept_alive_and_then_whole():
    async with running(num_engines=0, gateway=OFTEN) as system:
        engine = asyncio.create_task(_later(system, system.add_engine))
        headers = {"x-request-id": "mine"}
        reply = await system.client.post(CHAT, json=system.chat(max_tokens=2), headers=headers)
        await engine
        assert reply.status_code == 200
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert reply.headers["x-request-id"] == "mine"
        assert reply.headers["cache-control"] == "no-cache"
        assert reply.headers["x-accel-buffering"] == "no"
        comments, _, rest = reply.text.rpartition(COMMENT)
        assert 2 <= reply.text.count(COMMENT) <= 5
        assert comments.replace(COMMENT, "") == ""
        assert rest == "data: {}\n\n" * 2 + "data: [DONE]\n\n"
        system.assert_empty()


async def test_so_is_one_that_its_engine_has_not_begun():
    async with running(num_engines=1, gateway=OFTEN) as system:
        system.engines[0].gate.clear()

        async def go_on() -> None:
            system.engines[0].gate.set()

        task = asyncio.create_task(_later(system, go_on))
        reply = await system.client.post(CHAT, json=system.chat(max_tokens=2))
        await task
        assert reply.text.startswith(COMMENT)
        assert reply.text.endswith("data: {}\n\ndata: [DONE]\n\n")
        system.assert_empty()


@pytest.mark.parametrize("fields", [{"stream": False}, {"stream": None}])
async def test_what_is_no_stream_gets_no_comments(fields):
    async with running(num_engines=0, gateway=OFTEN) as system:
        engine = asyncio.create_task(_later(system, system.add_engine))
        reply = await system.client.post(CHAT, json=system.chat(**fields))
        await engine
        assert COMMENT not in reply.text
        system.assert_empty()


async def test_nothing_is_sent_unless_it_is_asked_for():
    async with running(num_engines=0) as system:
        engine = asyncio.create_task(_later(system, system.add_engine))
        reply = await system.client.post(CHAT, json=system.chat())
        await engine
        assert COMMENT not in reply.text


async def test_a_refusal_after_a_comment_is_an_event():
    limits = {"max_hold_s": 0.2}
    async with running(num_engines=0, gateway=OFTEN, router=limits) as system:
        reply = await system.client.post(CHAT, json=system.chat())
        assert reply.status_code == 200
        _, _, event = reply.text.rpartition(COMMENT)
        assert event.startswith("data: ")
        assert event.endswith("\n\n")
        error = json.loads(event.removeprefix("data: "))["error"]
        assert error["code"] == "expired"
        assert "[DONE]" not in reply.text
        system.assert_empty()


@pytest.mark.parametrize("body", [b'{"error": {"code": 400}}', b'{"error":\n {"code": 400}}\n'])
async def test_so_is_an_engines_own_refusal(body):
    async with running(num_engines=1, gateway=OFTEN) as system:
        [engine] = system.engines
        engine.status, engine.chunk = 400, body
        engine.headers = [(b"content-type", b"application/json")]
        engine.end = b""
        engine.gate.clear()

        async def go_on() -> None:
            engine.gate.set()

        task = asyncio.create_task(_later(system, go_on))
        reply = await system.client.post(CHAT, json=system.chat())
        await task
        assert reply.status_code == 200
        _, _, event = reply.text.rpartition(COMMENT)
        data = "".join(line.removeprefix("data: ") for line in event.strip().split("\n"))
        assert json.loads(data)["error"]["code"] == 400
        system.assert_empty()


async def test_a_client_that_leaves_ends_the_comments():
    async with running(num_engines=0, gateway=OFTEN) as system:
        async with system.client.stream("POST", CHAT, json=system.chat()) as reply:
            async for text in reply.aiter_text():
                assert text == COMMENT
                break
        await system.until(lambda: system.outcomes["reneged"] == 1)
        await asyncio.sleep(0.1)
        names = {task.get_coro().__qualname__ for task in asyncio.all_tasks()}
        assert not [name for name in names if "KeepAlive" in name]
        system.assert_empty()
