"""A gateway before servers that are not ours: what comes through, and what breaks."""

import asyncio
import contextlib
import json

import httpx
import pytest

from tests.serving.external.before_servers import (
    BODY,
    CHAT,
    COMPLETIONS,
    SAID,
    ask,
    attached,
    content,
    infos,
)
from tests.serving.external.fake_vllm import FakeVllm, listening, prompt_ids, words
from tests.support.running_gateway import free_port, running


async def test_streams_pass_as_the_server_sends_them():
    server = FakeVllm()
    async with attached(server) as system:
        reply = await ask(system)
        assert content(reply.text) == SAID
        own = await httpx.AsyncClient().post(server.url + CHAT, json=BODY)
        assert reply.text == own.text
        assert reply.headers["x-headway-engine"] == server.url.removeprefix("http://")
        reply = await ask(system, stream_options={"include_usage": True})
        usage = json.loads(reply.text.splitlines()[-4][6:])["usage"]
        assert usage == {"prompt_tokens": 5, "completion_tokens": 8}
        system.assert_empty()


async def test_whole_replies_pass():
    server = FakeVllm()
    async with attached(server) as system:
        reply = await ask(system, stream=False)
        assert reply.json()["choices"][0]["message"]["content"] == SAID
        assert "return_token_ids" not in server.bodies[-1]
        system.assert_empty()


async def test_ids_that_the_client_asks_for_are_its_own():
    async with attached(FakeVllm()) as system:
        reply = await ask(system, return_token_ids=True)
        assert '"token_ids":[' in reply.text
        assert '"prompt_token_ids":[' in reply.text


async def test_state_is_that_of_the_metrics_and_of_what_was_sent():
    server = FakeVllm(num_others=3)
    async with attached(server) as system:
        server.gate.clear()
        name = server.url.removeprefix("http://")
        task = asyncio.ensure_future(ask(system))

        def snapshot():
            return system.gateway.state().replicas[name].snapshot

        await system.until(lambda: (each := snapshot()) and each.num_inflight_reqs == 4)
        made = snapshot()
        assert made.num_pending_prefill_tokens > 0
        assert made.kv_cache_usage == 0.25
        assert made.num_free_kv_tokens == 12_000
        assert infos(system)[name].num_kv_tokens == 16_000
        assert infos(system)[name].is_external
        server.gate.set()
        await task
        await system.until(lambda: snapshot().num_inflight_reqs == 3)
        await system.until(lambda: snapshot().num_pending_prefill_tokens == 0)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("num_tokens", [0, 1, 4, 7])
async def test_a_reply_that_breaks_off_goes_on_at_another(path, num_tokens):
    one, two = FakeVllm(break_after=num_tokens), FakeVllm(break_after=num_tokens)
    async with attached(one, two) as system:
        prompt = {"prompt": "hello"} if path == COMPLETIONS else {}
        reply = await ask(system, path, stream_options={"include_usage": True}, **prompt)
        assert content(reply.text) == SAID
        assert '"usage":{"prompt_tokens":5,"completion_tokens":8}' in reply.text
        assert len(one.bodies) + len(two.bodies) in (2, 3)  # the other breaks off, too, if early
        assert system.outcomes["completed"] == 1
        system.assert_empty()


async def test_it_goes_on_where_ids_are_not_told_if_it_comes_again():
    one = FakeVllm(break_after=3, tells_ids=False)
    two = FakeVllm(break_after=3, tells_ids=False)
    async with attached(one, two) as system:
        assert content((await ask(system, temperature=0)).text) == SAID
        one.break_after = two.break_after = 3
        reply = await ask(system)
        assert "cannot go on at another server" in reply.text
        assert "[DONE]" not in reply.text
        system.assert_empty()


async def test_what_cannot_go_on_ends_with_an_error_at_once():
    one, two = FakeVllm(break_after=3), FakeVllm(break_after=3)
    async with attached(one, two) as system:
        reply = await ask(system, stop=["never"])
        assert reply.status_code == 200
        assert '"code":502' in reply.text
        assert "[DONE]" not in reply.text
        assert len(one.bodies) + len(two.bodies) == 1
        system.assert_empty()


async def test_resume_can_be_off():
    one, two = FakeVllm(break_after=3), FakeVllm(break_after=3)
    async with attached(one, two, external={"resume": "off"}) as system:
        reply = await ask(system, temperature=0)
        assert '"code":502' in reply.text
        assert not any("return_token_ids" in body for body in one.bodies + two.bodies)


async def test_all_streams_of_a_server_that_dies_go_on():
    one, two = FakeVllm(token_s=0.01), FakeVllm(token_s=0.01)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(listening(two))
        await stack.enter_async_context(dying := contextlib.AsyncExitStack())
        await dying.enter_async_context(listening(one))
        urls = [{"url": each.url} for each in (one, two)]
        system = await stack.enter_async_context(running(0, external=urls))
        await system.until(lambda: len(infos(system)) == 2)
        asks = [[{"role": "user", "content": f"number {n}"}] for n in range(30)]
        tasks = [asyncio.ensure_future(ask(system, messages=m, max_tokens=60)) for m in asks]
        await system.until(lambda: one.num_running > 5 and one.num_steps > 100)
        await dying.aclose()
        replies = await asyncio.gather(*tasks)
        for messages, reply in zip(asks, replies, strict=True):
            assert content(reply.text) == words(prompt_ids(messages), 60)
        assert list(infos(system)) == [two.url.removeprefix("http://")]
        assert system.outcomes["completed"] == 30
        assert system.gateway.state().suspects.num_suspects == 0
        system.assert_empty()


async def test_a_server_comes_back():
    server, port = FakeVllm(), free_port()
    async with running(0, external=[{"url": f"http://127.0.0.1:{port}"}]) as system:
        task = asyncio.ensure_future(ask(system))  # held: it is not known yet what there will be
        await asyncio.sleep(0.1)
        async with listening(server, port):
            assert content((await task).text) == SAID
        await system.until(lambda: not infos(system))
        async with listening(server, port):
            await system.until(lambda: bool(infos(system)))
            assert content((await ask(system)).text) == SAID


async def test_errors_before_the_first_token_are_tried_elsewhere():
    for trouble in ("500", "error event", "redirect"):
        one, two = FakeVllm(trouble=trouble), FakeVllm()
        async with attached(one, two) as system:
            for _ in range(4):
                assert content((await ask(system)).text) == SAID
            assert one.bodies, trouble
            system.assert_empty()


async def test_errors_of_the_client_are_the_clients():
    for trouble in ("400", "bad request event"):
        async with attached(FakeVllm(trouble=trouble)) as system:
            reply = await ask(system)
            assert (reply.status_code, reply.json()["error"]["message"]) == (400, "wrong")
            system.assert_empty()


async def test_only_the_end_is_missing():
    async with attached(FakeVllm(trouble="no end")) as system:
        assert content((await ask(system)).text) == SAID
        assert system.outcomes["completed"] == 1


async def test_an_engine_that_has_died_behind_its_server_is_lost():
    server = FakeVllm()
    async with attached(server) as system:
        server.is_dead, server.trouble = True, "error event"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await ask(system)
        assert not infos(system)


async def test_clients_that_leave_hang_up_there():
    server = FakeVllm(token_s=0.01)
    async with attached(server) as system:
        async with system.client.stream("POST", CHAT, json={**BODY, "max_tokens": 4000}) as reply:
            async for _ in reply.aiter_bytes():
                break
        await system.until(lambda: server.num_running == 0)
        await system.until(lambda: system.gateway.state().num_open_requests == 0)
        system.assert_empty()


async def test_a_slow_client_holds_its_stream_up_and_no_other():
    server = FakeVllm()
    settings = {"gateway": {"stream_window_bytes": 4096}}
    async with attached(server, settings=settings) as system:
        body = {**BODY, "max_tokens": 4000, "model": "tiny"}
        reader, writer = await asyncio.open_connection("127.0.0.1", system.client.base_url.port)
        data = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
        reader._transport.pause_reading()
        writer.write(head.encode() + data)
        await asyncio.sleep(0.3)
        assert content((await ask(system)).text) == SAID
        reader._transport.resume_reading()
        text = b""
        async with asyncio.timeout(20):
            while b"[DONE]" not in text:
                text += await reader.read(65536)
        writer.close()
        assert text.count(b'"content":" w') == 4000


async def test_priorities_stay_here():
    server = FakeVllm()
    async with attached(server) as system:
        reply = await system.client.post(
            CHAT, json={**BODY, "priority": -5}, headers={"x-vllm-priority": "-3"}
        )
        assert content(reply.text) == SAID
        assert server.bodies[-1]["priority"] == 0
        assert not any(name.lower() == "x-vllm-priority" for name in server.headers[-1])


async def test_questions_are_passed_on():
    server = FakeVllm()
    async with attached(server) as system:
        text = (await system.client.get("/metrics/engines")).text
        name = server.url.removeprefix("http://")
        assert f'vllm:num_requests_running{{engine="{name}",model_name="tiny"}} 0.0' in text


async def test_conversations_go_back_to_the_server_that_has_them():
    one, two = FakeVllm(), FakeVllm()
    async with attached(one, two) as system:
        for number in range(6):  # each letter is a token of the fake's
            messages = [{"role": "user", "content": f"{number} " + "some words " * 150}]
            before = len(one.bodies), len(two.bodies)
            for _ in range(3):
                reply = await ask(system, messages=messages, max_tokens=40)
                said = content(reply.text)
                assert said == words(prompt_ids(messages), 40)
                messages += [{"role": "assistant", "content": said}]
                messages += [{"role": "user", "content": "and then? " * 10}]
            grown = len(one.bodies) - before[0], len(two.bodies) - before[1]
            assert sorted(grown) == [0, 3]
        state = system.gateway.state()
        assert all(each.num_cached_blocks > 0 for each in state.replicas.values())


async def test_own_engines_beside():
    """Both serve what is theirs, and a server that is removed from the file drains."""
    server = FakeVllm()
    async with attached(server) as system:
        await system.add_engine()
        assert content((await ask(system)).text) == SAID
        assert (await system.client.post(CHAT, json=system.chat())).status_code == 200
        engines = system.gateway.driver.engines
        engines.use_external((), 65536)
        await system.until(lambda: list(infos(system)) == ["r0"])
        assert (await system.client.post(CHAT, json=system.chat())).status_code == 200
