"""How a batch is run: one gateway at a time, in the gaps, past what may pass with time."""

import asyncio
import json

from router import RequestClass
from tests.serving.gateway.http.endpoints.batch.jobs import (
    CHAT,
    answer_with,
    batches_running,
    begin,
    content,
    ended,
    line,
)


async def test_one_of_two_gateways_runs_a_batch_and_both_answer_for_it(tmp_path):
    async with (
        batches_running(tmp_path, batch={"max_inflight": 3}) as (one, client),
        batches_running(tmp_path, batch={"max_inflight": 3}) as (other, other_client),
    ):
        for system in (one, other):
            system.engines[0].gate.clear()
        batch = await begin(client, [line(number) for number in range(20)])
        await one.until(lambda: one.engines[0].num_started + other.engines[0].num_started > 0)
        await asyncio.sleep(1.5)  # in which the other has looked for batches
        assert 0 in (one.engines[0].num_started, other.engines[0].num_started)
        seen = await other_client.batches.retrieve(batch.id)
        assert (seen.id, seen.status) == (batch.id, "in_progress")
        assert (await other_client.batches.list()).data == [seen]
        for system in (one, other):
            system.engines[0].gate.set()
        batch = await ended(other_client, batch)
        assert batch.request_counts.completed == 20
        assert one.engines[0].num_started + other.engines[0].num_started == 20
        assert await content(other_client, batch.output_file_id) == await content(
            client, batch.output_file_id
        )


async def test_a_gateway_that_is_told_to_cancel_another_ones_batch_has_it_cancelled(tmp_path):
    async with batches_running(tmp_path, batch={"max_inflight": 1}) as (one, client):
        one.engines[0].gate.clear()
        batch = await begin(client, [line(number) for number in range(5)])
        await one.until(lambda: one.engines[0].num_started == 1)
        async with batches_running(tmp_path) as (other, other_client):
            await other_client.batches.cancel(batch.id)
            assert (await ended(client, batch)).status == "cancelled"
            assert other.engines[0].num_started == 0
        await one.until(lambda: one.engines[0].num_cancelled == 1)


async def test_a_gateway_that_leaves_hands_its_batch_on(tmp_path):
    lines = [line(number) for number in range(30)]
    async with batches_running(tmp_path, batch={"max_inflight": 2}) as (one, client):
        one.engines[0].closes_at = 10
        batch = await begin(client, lines)
        await one.until(lambda: one.engines[0].num_started > 10)
    async with batches_running(tmp_path) as (other, client):
        batch = await ended(client, batch)
        assert batch.request_counts.to_dict() == {"total": 30, "completed": 30, "failed": 0}
        answers = await content(client, batch.output_file_id)
        assert [each["custom_id"] for each in answers] == [each["custom_id"] for each in lines]
        assert other.engines[0].num_started == 20  # what the first one had answered was kept


async def test_lines_are_of_class_batch_whatever_they_say(tmp_path):
    async with batches_running(tmp_path) as (system, client):
        system.engines[0].gate.clear()
        await begin(client, [line(1), line(2, priority_class="interactive")])
        await system.until(lambda: len(system.gateway.driver.exchanges) == 2)
        exchanges = system.gateway.driver.exchanges.values()
        assert {each.request.priority_class for each in exchanges} == {RequestClass.BATCH}


async def test_what_may_pass_with_time_is_no_answer(tmp_path):
    async with batches_running(tmp_path, router={"max_attempts": 1}) as (system, client):
        [engine] = system.engines
        answer_with(engine, {"error": {"message": "busy"}}, status=503)
        batch = await begin(client, [line(number) for number in range(4)])
        await system.until(lambda: engine.num_started > 0)
        await asyncio.sleep(0.2)
        seen = await client.batches.retrieve(batch.id)
        assert seen.status == "in_progress"
        assert seen.request_counts.failed == 0
        answer_with(engine)
        batch = await ended(client, batch)
        assert batch.request_counts.completed == 4


async def test_a_batch_waits_for_the_first_engine(tmp_path):
    async with batches_running(tmp_path, num_engines=0) as (system, client):
        batch = await begin(client, [line(1)])
        await asyncio.sleep(0.3)
        answer_with(await system.add_engine())
        assert (await ended(client, batch)).request_counts.completed == 1


async def test_other_endpoints_are_answered_too(tmp_path):
    async with batches_running(tmp_path) as (_, client):
        body = {"model": "fake-model", "prompt": "hi", "max_tokens": 1}
        asked = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
        batch = await ended(client, await begin(client, [asked], endpoint="/v1/completions"))
        assert batch.request_counts.completed == 1


async def test_no_more_are_open_than_may_be(tmp_path):
    async with batches_running(tmp_path, batch={"max_inflight": 5}) as (system, client):
        [engine] = system.engines
        engine.gate.clear()
        batches = [await begin(client, [line(n) for n in range(10)]) for _ in range(3)]
        await system.until(lambda: engine.num_started == 5)
        await asyncio.sleep(0.6)
        assert engine.num_started == 5
        state = system.gateway.state().batches
        assert (state.num_running, state.num_open_lines, state.num_allowed_lines) == (3, 5, 5)
        engine.gate.set()
        for batch in batches:
            await ended(client, batch)
        await system.until(lambda: system.gateway.state().batches.num_running == 0)
        assert system.gateway.state().batches.num_completed_lines == 30
        text = (await system.client.get("/metrics")).text
        assert 'headway_batch_lines_total{gateway="0"} 30.0' in text


async def test_beside_others_few_lines_are_open(tmp_path):
    async with batches_running(tmp_path) as (system, client):
        [engine] = system.engines
        engine.gate.clear()
        other = asyncio.ensure_future(system.client.post(CHAT, json=system.chat(stream=False)))
        await system.until(lambda: engine.num_started == 1)
        await begin(client, [line(n) for n in range(100)])
        await system.until(lambda: engine.num_started > 1)
        await asyncio.sleep(1.0)
        assert system.gateway.state().batches.is_busy
        assert 2 <= engine.num_started < 20
        engine.gate.set()
        assert json.loads((await other).text)


async def test_a_file_that_is_gone_fails_its_batch(tmp_path):
    async with batches_running(tmp_path) as (system, client):
        system.engines[0].gate.clear()
        first = await begin(client, [line(1)])
        (tmp_path / "files" / first.input_file_id).unlink()
        batch = await client.batches.create(
            input_file_id=first.input_file_id, endpoint=CHAT, completion_window="24h"
        )
        batch = await ended(client, batch)
        assert batch.status == "failed"
        assert "gone" in batch.errors.data[0].message


async def test_lines_may_be_for_a_route(tmp_path):
    routes = {"auto": {"models": {"fake-model": {}}}}
    async with batches_running(tmp_path, routes=routes) as (system, client):
        batch = await ended(client, await begin(client, [line(1, model="auto")]))
        assert (batch.status, batch.request_counts.completed) == ("completed", 1)
        assert system.engines[0].bodies[0]["model"] == "fake-model"
