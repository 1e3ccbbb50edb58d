"""A batch is its tenant's alone, and keeps to what its tenant may."""

import openai
import pytest

from serving.gateway.tenants.keys import KeysFile, make_key
from tests.serving.gateway.http.endpoints.batch.jobs import (
    batches_running,
    begin,
    client_of,
    ended,
    line,
    upload,
)


@pytest.fixture
def keys(tmp_path):
    made = {}
    with KeysFile(tmp_path / "keys.json") as file:
        for tenant in ("a", "b"):
            made[tenant], entry = make_key(tenant)
            file.keys.append(entry)
        file.save()
    return made


def with_keys(tmp_path, **settings):
    auth = {"keys_file": str(tmp_path / "keys.json")}
    return batches_running(tmp_path / "batches", auth=auth, **settings)


async def test_others_files_and_batches_are_not_there(tmp_path, keys):
    async with with_keys(tmp_path) as (system, _):
        a, b = client_of(system, keys["a"]), client_of(system, keys["b"])
        batch = await ended(a, await begin(a, [line(1)]))
        assert batch.status == "completed"
        assert (await b.batches.list()).data == (await b.files.list()).data == []
        for ask in (
            lambda: b.batches.retrieve(batch.id),
            lambda: b.batches.cancel(batch.id),
            lambda: b.files.content(batch.output_file_id),
            lambda: b.files.delete(batch.input_file_id),
            lambda: b.batches.list(after=batch.id),
        ):
            with pytest.raises((openai.NotFoundError, openai.BadRequestError)):
                await ask()
        with pytest.raises(openai.NotFoundError):
            await b.batches.create(
                input_file_id=batch.input_file_id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
            )
        with pytest.raises(openai.AuthenticationError):
            await client_of(system).files.list()


async def test_what_a_batch_takes_is_its_tenants(tmp_path, keys):
    async with with_keys(tmp_path) as (system, _):
        a = client_of(system, keys["a"])
        await ended(a, await begin(a, [line(number) for number in range(5)]))
        assert system.gateway.tenants.usage()["a"].num_requests == 5


async def test_a_quota_makes_a_batch_wait(tmp_path, keys, monkeypatch):
    tenants = {"a": {"max_concurrent_requests": 1}}
    async with with_keys(tmp_path, tenants=tenants, batch={"max_inflight": 4}) as (system, _):
        a = client_of(system, keys["a"])
        batch = await ended(a, await begin(a, [line(number) for number in range(3)]))
        assert batch.request_counts.to_dict() == {"total": 3, "completed": 3, "failed": 0}
        assert system.gateway.tenants.usage()["a"].num_requests == 3


async def test_a_class_that_is_not_allowed_is_refused_at_once(tmp_path, keys):
    tenants = {"a": {"classes": ["standard"]}}
    async with with_keys(tmp_path, tenants=tenants) as (system, _):
        a = client_of(system, keys["a"])
        with pytest.raises(openai.PermissionDeniedError):
            await begin(a, [line(1)])


async def test_a_model_that_is_not_allowed_fails_the_batch(tmp_path, keys):
    tenants = {"a": {"models": ["another"]}}
    async with with_keys(tmp_path, tenants=tenants) as (system, _):
        a = client_of(system, keys["a"])
        batch = await ended(a, await begin(a, [line(1)]))
        assert batch.errors.data[0].code == "model_not_found"


async def test_a_batch_ends_with_its_tenants_last_key(tmp_path, keys):
    async with with_keys(tmp_path, batch={"max_inflight": 1}) as (system, _):
        a, b = client_of(system, keys["a"]), client_of(system, keys["b"])
        system.engines[0].closes_at = 2
        batch = await begin(a, [line(number) for number in range(5)])
        await system.until(lambda: system.engines[0].num_started == 3)
        system.gateway.tenants.use_keys([])
        system.engines[0].gate.set()
        store = system.gateway.batches.keeping.store
        run = system.gateway.batches.keeping.database.run

        async def failed():
            return (await run(store.find, "a", batch.id)).status == "failed"

        while not await failed():
            pass
        found = await run(store.find, "a", batch.id)
        assert found.errors[0].code == "invalid_api_key"
        assert system.engines[0].num_started == 3
        with pytest.raises(openai.AuthenticationError):
            await upload(b, [line(1)])
