"""The null engine through its ASGI application, without a server."""

import asyncio
import json
from typing import Any

import pytest

from benchmarks.systems.null_engine import NullEngine, NullEngineArgs
from serving.config import ConfigError, parse
from serving.stream.accounting import RequestAccounting, current_accounting
from tests.support.asgi_caller import Caller

CHAT = "/v1/chat/completions"


def call(body: Any, path: str = CHAT, step_ms: float = 0.0) -> Caller:
    async def run() -> Caller:
        return await Caller(NullEngine(NullEngineArgs(step_ms=step_ms)).app, body, path).run()

    return asyncio.run(run())


def test_chat_stream_is_as_vllm_writes_it() -> None:
    caller = call({"max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}})
    role, *tokens, usage = caller.events
    assert (caller.status, caller.complete) == (200, True)
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [token["choices"][0]["delta"]["content"] for token in tokens] == [" 1", " 2", " 3"]
    assert [token["choices"][0]["finish_reason"] for token in tokens] == [None, None, "length"]
    assert usage["usage"]["completion_tokens"] == 3
    assert len({event["id"] for event in caller.events}) == 1
    # One event per token, or the benchmark could not count tokens by events.
    assert len(caller.parts) == 1 + 3 + 1 + 1 + 1


def test_completion_stream() -> None:
    caller = call({"max_tokens": 2, "stream": True}, "/v1/completions")
    assert [event["choices"][0]["text"] for event in caller.events] == [" 1", " 2"]


def test_whole_reply() -> None:
    reply = json.loads(call({"max_completion_tokens": 4}).text)
    assert reply["choices"][0]["message"]["content"] == " 1 2 3 4"
    assert reply["usage"]["completion_tokens"] == 4
    reply = json.loads(call({"max_tokens": 1}, "/v1/completions").text)
    assert (reply["object"], reply["choices"][0]["text"]) == ("text_completion", " 1")


def test_bad_requests() -> None:
    assert call(b"{").status == 400
    assert call({"max_tokens": "many"}).status == 400
    assert call({}, "/v1/nothing").status == 404
    assert json.loads(call({}, "/v1/models").text)["data"][0]["id"] == "null-engine"


def test_streams_with_one_step_time_advance_together() -> None:
    """`on_step` is called once per step, not per stream, and never while idle."""

    async def run() -> None:
        engine = NullEngine(NullEngineArgs(step_ms=1))
        num_steps = 0

        def on_step() -> None:
            nonlocal num_steps
            num_steps += 1

        engine.subscribe(on_step)
        body = {"max_tokens": 10, "stream": True}
        tasks = [asyncio.create_task(Caller(engine.app, body, CHAT).run()) for _ in range(20)]
        await asyncio.sleep(0)
        snapshot = engine.snapshot(1, [])
        assert (snapshot.num_running_reqs, snapshot.num_pending_prefill_tokens) == (20, 0)
        await asyncio.gather(*tasks)
        assert 9 <= num_steps <= 11
        await asyncio.sleep(0.01)
        last = num_steps
        await asyncio.sleep(0.01)
        assert num_steps == last
        snapshot = engine.snapshot(2, [])
        assert (snapshot.num_running_reqs, snapshot.num_output_tokens_total) == (0, 200)
        assert snapshot.num_decode_context_tokens == 0

    asyncio.run(run())


def test_request_sets_its_own_step_time() -> None:
    async def run() -> None:
        engine = NullEngine(NullEngineArgs(step_ms=60_000))
        body = {"max_tokens": 50, "stream": True, "null_engine_step_ms": 0}
        caller = await asyncio.wait_for(Caller(engine.app, body, CHAT).run(), 1)
        assert len(caller.events) == 51

    asyncio.run(run())


def test_disconnect_stops_the_stream() -> None:
    async def run() -> None:
        engine = NullEngine(NullEngineArgs(step_ms=1))
        accounting = RequestAccounting(num_prompt_tokens=0)
        current_accounting.set(accounting)
        caller = Caller(engine.app, {"max_tokens": 1_000_000, "stream": True}, CHAT)
        task = asyncio.create_task(caller.run())
        await asyncio.sleep(0.02)
        assert engine.num_running_reqs == 1
        caller.leave()
        await asyncio.wait_for(task, 1)
        assert not caller.complete
        assert engine.num_running_reqs == 0
        assert engine.snapshot(1, []).num_decode_context_tokens == 0
        assert accounting.usage().num_output_tokens == engine.num_output_tokens_total > 1

    asyncio.run(run())


def test_cancelled_stream_leaves_the_others_alone() -> None:
    async def run() -> None:
        engine = NullEngine(NullEngineArgs(step_ms=1))
        body = {"max_tokens": 20, "stream": True}
        first, second = (
            asyncio.create_task(Caller(engine.app, body, CHAT).run()) for _ in range(2)
        )
        await asyncio.sleep(0.005)
        first.cancel()
        assert (await asyncio.wait_for(second, 1)).complete
        assert engine.num_running_reqs == 0

    asyncio.run(run())


def test_bad_engine_args_name_the_key() -> None:
    config = parse({"engine": {"args": {"step_millis": 3}}})
    with pytest.raises(ConfigError, match=r"engine\.args.*step_millis"):
        asyncio.run(NullEngine.start(config, None, 0))
