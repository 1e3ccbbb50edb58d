"""The gateway over real sockets: HTTP in front, fake engines behind."""

import asyncio
import logging

import pytest

from serving.config import renamed
from serving.stream.frames import Resync
from tests.support.running_gateway import CHAT, running


async def test_many_streams_end_whole_and_leave_nothing():
    async with running() as system:
        replies = await asyncio.gather(
            *(system.client.post(CHAT, json=system.chat(max_tokens=20)) for _ in range(100))
        )
        assert {reply.status_code for reply in replies} == {200}
        assert all(reply.text.count("data: {}") == 20 for reply in replies)
        assert all(reply.text.endswith("data: [DONE]\n\n") for reply in replies)
        assert system.outcomes["completed"] == 100
        assert all(engine.num_started > 10 for engine in system.engines)
        system.assert_empty()


async def test_unknown_fields_and_the_request_id_reach_the_engine():
    async with running(num_engines=1) as system:
        body = system.chat(chat_template_kwargs={"x": 1}, guided="thing")
        await system.client.post(CHAT, json=body, headers={"x-request-id": "mine"})
        assert system.engines[0].bodies == [body]


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/messages"])
async def test_a_model_that_no_reply_can_name_is_not_found(path):
    """Half a pair of surrogates: JSON can bear it, UTF-8 cannot."""
    body = b'{"model": "a\\ud800", "prompt": "x", "messages": [{"role": "user", "content": "x"}]}'
    async with running(num_engines=1) as system:
        reply = await system.client.post(
            path, content=body, headers={"content-type": "application/json"}, timeout=5
        )
        assert reply.status_code == 404
        assert "a\\ud800" in reply.json()["error"]["message"]
        system.assert_empty()


async def test_a_client_that_leaves_frees_its_engine():
    async with running() as system:
        for engine in system.engines:
            engine.gate.clear()
        task = asyncio.create_task(system.client.post(CHAT, json=system.chat(max_tokens=5)))
        await system.until(lambda: system.num_engine_streams == 1)
        task.cancel()
        await system.until(lambda: system.num_engine_streams == 0, timeout_s=1)
        await system.until(lambda: system.outcomes["reneged"] == 1)
        system.assert_empty()


async def test_a_client_that_hangs_up_at_done_has_had_its_reply():
    """It may do so before the engine has told what the reply took."""
    async with running(num_engines=1) as system:
        [engine] = system.engines
        engine.chunk, engine.closes_at = b"data: [DONE]\n\n", 1
        body = system.chat(max_tokens=2)
        async with system.client.stream("POST", CHAT, json=body) as reply:
            async for line in reply.aiter_lines():
                if line == "data: [DONE]":
                    break
        await asyncio.sleep(0.1)
        engine.gate.set()
        await system.until(lambda: system.outcomes["completed"] == 1)
        assert system.outcomes["reneged"] == engine.num_cancelled == 0
        system.assert_empty()


async def test_a_client_that_leaves_the_queue_is_forgotten():
    async with running(num_engines=0) as system:
        task = asyncio.create_task(system.client.post(CHAT, json=system.chat()))
        await system.until(lambda: system.gateway.state().held.num_requests == 1)
        task.cancel()
        await system.until(lambda: system.outcomes["reneged"] == 1)
        system.assert_empty()


async def test_a_request_waits_for_the_first_engine():
    async with running(num_engines=0) as system:
        task = asyncio.create_task(system.client.post(CHAT, json=system.chat()))
        await system.until(lambda: system.gateway.state().held.num_requests == 1)
        await system.add_engine()
        assert (await task).status_code == 200
        system.assert_empty()


async def test_a_request_that_waits_too_long_is_told_so():
    async with running(num_engines=0, router={"max_hold_s": 0.2}) as system:
        reply = await system.client.post(CHAT, json=system.chat())
        assert reply.status_code == 503
        assert "router.max_hold_s" in reply.json()["error"]["message"]
        assert system.outcomes["expired"] == 1


async def test_a_full_queue_answers_429_with_retry_after():
    async with running(num_engines=0, router={"max_held_requests": 1}) as system:
        first = asyncio.create_task(system.client.post(CHAT, json=system.chat()))
        await system.until(lambda: system.gateway.state().held.num_requests == 1)
        reply = await system.client.post(CHAT, json=system.chat())
        assert reply.status_code == 429
        assert int(reply.headers["retry-after"]) >= 1
        assert reply.json()["error"]["code"] == "queue_full"
        await system.add_engine()
        assert (await first).status_code == 200


async def test_a_draining_engine_finishes_but_gets_no_more():
    async with running() as system:
        for engine in system.engines:
            engine.gate.clear()
        task = asyncio.create_task(system.client.post(CHAT, json=system.chat(max_tokens=3)))
        await system.until(lambda: system.num_engine_streams == 1)
        (name,) = (f"r{i}" for i, server in enumerate(system.servers) if server.num_streams)
        draining = system.engines[int(name[1:])]
        del system.members[name]
        system.gateway.driver.engines.set_members(system.members)
        for engine in system.engines:
            engine.gate.set()
        assert (await task).text.count("data: {}") == 3
        before = draining.num_started
        for _ in range(5):
            assert (await system.client.post(CHAT, json=system.chat())).status_code == 200
        assert draining.num_started == before
        await system.until(lambda: len(system.gateway.driver.engines.infos) == 1)


async def test_an_engine_that_ray_names_again_gets_work_again():
    """Ray Serve does not name it while it has its deployment's new options; its streams go on."""
    async with running(num_engines=1) as system:
        system.engines[0].gate.clear()
        task = asyncio.create_task(system.client.post(CHAT, json=system.chat(max_tokens=3)))
        await system.until(lambda: system.num_engine_streams == 1)
        engines = system.gateway.driver.engines
        engines.set_members({})
        assert system.gateway.state().replicas["r0"].is_draining
        engines.set_members(system.members)
        assert not system.gateway.state().replicas["r0"].is_draining
        system.engines[0].gate.set()
        assert (await task).text.count("data: {}") == 3
        assert (await system.client.post(CHAT, json=system.chat())).status_code == 200
        system.assert_empty()


async def test_a_slow_reader_is_bounded_and_stalls_nobody():
    window = 4096
    async with running(num_engines=1, gateway={"stream_window_bytes": window}) as system:
        system.engines[0].chunk = b"data: " + b"x" * 1000 + b"\n\n"
        async with system.client.stream("POST", CHAT, json=system.chat(max_tokens=20_000)) as slow:
            await asyncio.sleep(0.3)  # it reads nothing meanwhile
            (exchange,) = system.gateway.driver.exchanges.values()
            held = sum(map(len, exchange._chunks))
            assert held <= window + 1100
            reply = await system.client.post(CHAT, json=system.chat(max_tokens=100))
            assert reply.text.count("data: x") == 100
            num_bytes = sum([len(piece) async for piece in slow.aiter_raw()])
            assert num_bytes == 20_000 * 1008 + len(b"data: [DONE]\n\n")


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_huge_body_is_refused_whole(chunked):
    async with running(gateway={"max_body_bytes": 100_000}) as system:

        async def pieces():
            for _ in range(50):
                yield b"x" * 10_000

        content = pieces() if chunked else b"x" * 500_000
        reply = await system.client.post(CHAT, content=content)
        assert reply.status_code == 413
        assert "gateway.max_body_bytes" in reply.json()["error"]["message"]
        assert not any(engine.num_started for engine in system.engines)


async def test_the_policy_can_be_switched_while_serving():
    async with running() as system:
        reply = await system.client.post("/headway/policy", json={"policy": "round_robin"})
        assert reply.json() == {"policy": "round_robin", "ablate": []}
        assert system.gateway.state().policy == "round_robin"
        without = {"policy": "headway", "ablate": ["order"]}
        assert (await system.client.post("/headway/policy", json=without)).json() == without
        assert system.gateway.state().ablate == ["order"]
        bad_parts = [{"policy": "headway", "ablate": parts} for parts in (["x"], "x", 1, None)]
        for body in ({"policy": "nonsense"}, {}, [], *bad_parts):
            reply = await system.client.post("/headway/policy", json=body)
            assert reply.status_code == 400
            assert "policy" in reply.json()["error"]["message"]


async def test_an_old_name_of_a_part_is_taken_with_one_warning(caplog):
    renamed._warn_once.cache_clear()
    caplog.set_level(logging.WARNING, renamed.__name__)
    old = {"policy": "headway", "ablate": ["order", "externality"]}
    async with running() as system:
        for _ in range(2):
            reply = await system.client.post("/headway/policy", json=old)
            assert reply.json() == {"policy": "headway", "ablate": ["order", "congestion_cost"]}
        both = {"policy": "headway", "ablate": ["externality", "congestion_cost"]}
        reply = await system.client.post("/headway/policy", json=both)
        assert reply.status_code == 400
        assert "externality is the old name of congestion_cost" in reply.text
    lines = [each.getMessage() for each in caplog.records if each.name == "serving.config.renamed"]
    assert lines == [
        "externality is now called congestion_cost; the next release drops the old name"
    ]


async def test_prompts_are_hashed_for_policies_that_compare_them():
    """The second turn of a conversation goes where the first went, though others came between."""
    async with running(router={"policy": "cache_aware"}) as system:
        turn = [{"role": "user", "content": "word " * 200}]
        for number in range(6):
            other = [{"role": "user", "content": f"{number} other " * 200}]
            await system.client.post(CHAT, json=system.chat(messages=turn, max_tokens=1))
            await system.client.post(CHAT, json=system.chat(messages=other, max_tokens=1))
            turn.append({"role": "assistant", "content": f"answer {number}"})
        [home] = [engine for engine in system.engines if turn[:1] in _prompts(engine)]
        assert sum(prompt[0] == turn[0] for prompt in _prompts(home)) == 6


def _prompts(engine) -> list:
    return [body["messages"] for body in engine.bodies]


async def test_the_small_endpoints():
    async with running(num_engines=1) as system:
        await system.client.post(CHAT, json=system.chat(max_tokens=2))
        health = (await system.client.get("/health")).json()
        assert (health["status"], health["num_engines"]) == ("ok", 1)
        models = (await system.client.get("/v1/models")).json()["data"]
        assert [model["id"] for model in models] == ["fake-model"]
        metrics = (await system.client.get("/metrics")).text
        ttft = "headway_time_to_first_token_seconds_count"
        assert ttft + '{class="standard",gateway="0",model="fake-model"} 1.0' in metrics
        assert 'headway_engines{gateway="0"} 1.0' in metrics
        assert 'headway_engine_kv_cache_usage_ratio{engine="r0",gateway="0"} 0.0' in metrics
        reply = await system.client.get("/v1/nothing")
        assert reply.status_code == 404
        assert reply.json()["error"]["type"] == "NotFoundError"


async def test_lost_news_of_the_cache_is_asked_for_anew():
    """And the gateway's view is the engine's again."""
    async with running(num_engines=1) as system:
        engine, engines = system.engines[0], system.gateway.driver.engines
        (replica,) = system.gateway.router._fleet
        posted, post = [], engines._connections["r0"].post
        engines._connections["r0"].post = lambda frame: (posted.append(frame), post(frame))
        engine.blocks.store([1, 2, 3])
        await system.until(lambda: replica.prefix_cache._blocks == {1, 2, 3})
        lost, receive = [], engines.on_blocks
        engines.on_blocks = lambda client, update: lost.append(update)
        engine.blocks.remove([2])
        await system.until(lambda: lost)
        engines.on_blocks = receive
        assert not any(isinstance(frame, Resync) for frame in posted)
        engine.blocks.store([4])
        await system.until(lambda: replica.prefix_cache._blocks == {1, 3, 4})
        assert sum(isinstance(frame, Resync) for frame in posted) == 1
        engine.blocks.clear()
        await system.until(lambda: not replica.prefix_cache._blocks)


async def test_no_engine_is_not_healthy():
    async with running(num_engines=0) as system:
        assert (await system.client.get("/health")).status_code == 503


async def test_the_class_comes_from_header_body_or_settings():
    async with running(num_engines=0, router={"default_class": "batch"}) as system:
        tasks = [
            asyncio.create_task(system.client.post(CHAT, json=body, headers=headers))
            for body, headers in (
                (system.chat(), {}),
                (system.chat(), {"x-headway-class": "interactive"}),
                (system.chat(priority_class="standard"), {"x-headway-class": "interactive"}),
            )
        ]
        await system.until(lambda: len(system.gateway.driver.exchanges) == 3)
        exchanges = system.gateway.driver.exchanges.values()
        classes = {exchange.request.priority_class.value for exchange in exchanges}
        assert classes == {"batch", "interactive", "standard"}
        await system.add_engine()
        assert {reply.status_code for reply in await asyncio.gather(*tasks)} == {200}
        headers = {"x-headway-class": "royal"}
        reply = await system.client.post(CHAT, json=system.chat(), headers=headers)
        assert reply.status_code == 400
        # In a body it is a field that vLLM does not know, and passes on.
        reply = await system.client.post(CHAT, json=system.chat(priority_class="royal"))
        assert reply.status_code == 200
