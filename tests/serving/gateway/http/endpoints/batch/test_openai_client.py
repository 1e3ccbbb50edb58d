"""OpenAI's own client uses files and batches of a gateway, unchanged."""

import openai
import pytest

from tests.serving.gateway.http.endpoints.batch.jobs import (
    ANSWER,
    CHAT,
    answer_with,
    batches_running,
    begin,
    client_of,
    content,
    ended,
    jsonl,
    line,
    upload,
)
from tests.support.running_gateway import running


async def test_a_batch_is_answered_line_by_line(tmp_path):
    async with batches_running(tmp_path, num_engines=2) as (system, client):
        lines = [line(number) for number in range(40)]
        batch = await begin(client, lines, metadata={"purpose": "nightly"})
        assert (batch.object, batch.status, batch.endpoint) == ("batch", "validating", CHAT)
        assert batch.expires_at - batch.created_at == 86_400
        batch = await ended(client, batch)
        assert batch.status == "completed"
        assert batch.request_counts.to_dict() == {"total": 40, "completed": 40, "failed": 0}
        assert batch.usage.input_tokens == 280
        assert batch.usage.total_tokens == 400
        assert batch.metadata == {"purpose": "nightly"}
        assert batch.model == "fake-model"
        assert batch.error_file_id is None
        for stamp in (batch.in_progress_at, batch.finalizing_at, batch.completed_at):
            assert stamp is not None
        assert batch.created_at <= batch.in_progress_at <= batch.completed_at
        answers = await content(client, batch.output_file_id)
        assert [each["custom_id"] for each in answers] == [each["custom_id"] for each in lines]
        assert len({each["id"] for each in answers}) == 40
        for each in answers:
            assert each["error"] is None
            assert each["response"]["status_code"] == 200
            assert each["response"]["request_id"]
            assert each["response"]["body"] == ANSWER
        output = await client.files.retrieve(batch.output_file_id)
        assert output.purpose == "batch_output"
        assert output.bytes == len((await client.files.content(output.id)).content)
        asked = [body for engine in system.engines for body in engine.bodies]
        assert sorted(body["messages"][0]["content"] for body in asked) == sorted(
            each["body"]["messages"][0]["content"] for each in lines
        )
        system.assert_empty()


async def test_files_are_uploaded_listed_read_and_deleted(tmp_path):
    async with batches_running(tmp_path) as (_, client):
        sent = jsonl([line(1)])
        files = [await upload(client, sent) for _ in range(3)]
        assert files[0].filename == "in.jsonl"
        assert files[0].bytes == len(sent)
        assert (files[0].status, files[0].purpose) == ("processed", "batch")
        assert (await client.files.retrieve(files[1].id)) == files[1]
        assert (await client.files.content(files[1].id)).content == sent
        newest_first = [each.id for each in reversed(files)]
        assert [each.id async for each in client.files.list(limit=1)] == newest_first
        page = await client.files.list(limit=2, order="asc", after=files[0].id)
        assert [each.id for each in page.data] == newest_first[1::-1]
        assert not page.has_more
        assert (await client.files.list(purpose="user_data")).data == []
        deleted = await client.files.delete(files[1].id)
        assert (deleted.id, deleted.deleted) == (files[1].id, True)
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(files[1].id)
        assert not (tmp_path / "files" / files[1].id).exists()


async def test_batches_are_listed_the_newest_first(tmp_path):
    async with batches_running(tmp_path) as (_, client):
        batches = [await begin(client, [line(number)]) for number in range(5)]
        page = await client.batches.list(limit=2)
        assert [each.id for each in page.data] == [batches[4].id, batches[3].id]
        assert page.has_more
        assert [each.id async for each in client.batches.list(limit=2)] == [
            each.id for each in reversed(batches)
        ]


async def test_requests_that_fail_are_in_the_error_file(tmp_path):
    async with batches_running(tmp_path) as (system, client):
        fault = {"error": {"message": "no", "type": "BadRequestError", "code": 400}}
        answer_with(system.engines[0], fault, status=400)
        batch = await ended(client, await begin(client, [line(1), line(2)]))
        assert batch.status == "completed"
        assert batch.request_counts.to_dict() == {"total": 2, "completed": 0, "failed": 2}
        assert batch.output_file_id is None
        [error, _] = await content(client, batch.error_file_id)
        assert error["response"]["status_code"] == 400
        assert error["response"]["body"] == fault


async def test_a_wrong_file_fails_with_the_line_and_why(tmp_path):
    async with batches_running(tmp_path) as (_, client):
        wrong = (
            jsonl([line(1), line(1)])
            + b"{no json\n"
            + jsonl([line(2, url="/v1/embeddings"), line(3, stream=True), line(4, model="other")])
        )
        batch = await ended(client, await begin(client, wrong))
        assert batch.status == "failed"
        assert batch.failed_at is not None
        assert [(error.code, error.line, error.param) for error in batch.errors.data] == [
            ("duplicate_custom_id", 2, "custom_id"),
            ("invalid_json_line", 3, None),
            ("invalid_url", 4, "url"),
            ("invalid_request", 5, "body.stream"),
        ]
        batch = await ended(client, await begin(client, [line(4, model="other")]))
        [error] = batch.errors.data
        assert (error.code, error.line) == ("model_not_found", 1)


async def test_a_cancelled_batch_keeps_what_has_been_answered(tmp_path):
    async with batches_running(tmp_path, batch={"max_inflight": 2}) as (system, client):
        [engine] = system.engines
        engine.closes_at = 4
        batch = await begin(client, [line(number) for number in range(10)])
        await system.until(lambda: engine.num_started > 4)
        cancelling = await client.batches.cancel(batch.id)
        assert cancelling.status == "cancelling"
        batch = await ended(client, batch)
        assert batch.status == "cancelled"
        assert batch.cancelled_at >= batch.cancelling_at
        answers = await content(client, batch.output_file_id)
        errors = await content(client, batch.error_file_id)
        assert len(answers) == batch.request_counts.completed >= 4
        assert len(answers) + len(errors) == 10
        assert {each["error"]["code"] for each in errors} == {"batch_cancelled"}
        assert all(each["response"] is None for each in errors)
        with pytest.raises(openai.ConflictError):
            await client.batches.cancel((await ended(client, await begin(client, b"{}"))).id)
        system.assert_empty()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"completion_window": "soon"}, "completion_window"),
        ({"endpoint": "/v1/audio/transcriptions"}, "endpoint"),
        ({"metadata": {"a": "b" * 513}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after"),
    ],
)
async def test_a_wrong_order_is_refused(tmp_path, fields, param):
    async with batches_running(tmp_path) as (_, client):
        with pytest.raises(openai.BadRequestError) as refused:
            await begin(client, [line(1)], **fields)
        assert refused.value.param == param


async def test_what_is_not_there_is_not_found(tmp_path):
    async with batches_running(tmp_path) as (_, client):
        with pytest.raises(openai.NotFoundError):
            await client.batches.retrieve("batch_no")
        with pytest.raises(openai.NotFoundError):
            await client.batches.cancel("batch_no")
        with pytest.raises(openai.NotFoundError):
            await client.files.content("../batches.sqlite")
        with pytest.raises(openai.NotFoundError):
            await client.batches.create(
                input_file_id="file-no", endpoint=CHAT, completion_window="24h"
            )
        with pytest.raises(openai.BadRequestError):
            await client.batches.list(after="batch_no")


async def test_a_file_in_use_is_not_deleted(tmp_path):
    async with batches_running(tmp_path) as (system, client):
        system.engines[0].gate.clear()
        batch = await begin(client, [line(1)])
        with pytest.raises(openai.ConflictError, match=batch.id):
            await client.files.delete(batch.input_file_id)
        system.engines[0].gate.set()
        await ended(client, batch)
        await client.files.delete(batch.input_file_id)


async def test_without_a_folder_the_setting_is_named():
    async with running(0) as system, client_of(system) as client:
        with pytest.raises(openai.NotFoundError, match=r"batch\.dir"):
            await upload(client, [line(1)])


async def test_a_window_that_is_over_expires_the_batch(tmp_path):
    async with batches_running(tmp_path) as (system, client):
        system.engines[0].gate.clear()
        batch = await begin(client, [line(1), line(2)], completion_window="1m")
        await system.until(lambda: system.engines[0].num_started > 0)
        database = system.gateway.batches.keeping.database
        database.clock = lambda clock=database.clock: clock() + 61
        batch = await ended(client, batch)
        assert batch.status == "expired"
        errors = await content(client, batch.error_file_id)
        assert [each["error"]["code"] for each in errors] == ["batch_expired"] * 2
