"""Uploads are bounded, and what is refused leaves nothing behind."""

import asyncio

import pytest

from tests.serving.gateway.http.endpoints.batch.jobs import (
    batches_running,
    begin,
    ended,
    line,
    upload,
)

FILES = "/v1/files"
SMALL = {"max_file_bytes": 100_000, "max_bytes": 2**20}


def form(content: bytes = b"{}", purpose: str = "batch") -> dict:
    return {"files": {"file": ("in.jsonl", content)}, "data": {"purpose": purpose}}


@pytest.fixture
def kept(tmp_path):
    return lambda: list((tmp_path / "files").iterdir())


async def test_a_file_that_is_too_large_is_refused(tmp_path, kept):
    async with batches_running(tmp_path, batch=SMALL) as (system, _):
        reply = await system.client.post(FILES, **form(b"x" * 100_000))
        assert reply.status_code == 200
        for size in (100_001, 150_000, 1_000_000):
            reply = await system.client.post(FILES, **form(b"x" * size))
            assert reply.status_code == 413
            assert "batch.max_file_bytes" in reply.json()["error"]["message"]
        assert len(kept()) == 1


async def test_a_disk_that_is_full_is_named(tmp_path, kept):
    async with batches_running(tmp_path, batch=SMALL) as (system, _):
        replies = [await system.client.post(FILES, **form(b"x" * 100_000)) for _ in range(12)]
        assert [reply.status_code for reply in replies].count(200) == len(kept()) < 11
        error = replies[-1].json()["error"]
        assert (error["code"], "batch.max_bytes" in error["message"]) == ("storage_full", True)


async def test_old_results_make_room_for_new_files(tmp_path):
    async with batches_running(tmp_path, batch=SMALL) as (system, client):
        batches = []
        for _ in range(12):
            batches.append(await begin(client, [line(1, user="x" * 90_000)]))
            assert (await ended(client, batches[-1])).status == "completed"
        found = [each.id async for each in client.batches.list()]
        assert batches[0].id not in found
        assert batches[-1].id in found
        assert system.gateway.state().batches.is_full is False


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ({"json": {}}, 415),
        ({"data": {"purpose": "batch"}, "files": {"other": b"x"}}, 400),
        (form(purpose="fine-tune"), 400),
        ({"files": {"file": ("in.jsonl", b"x")}}, 400),
        ({"files": [("file", b"x"), ("file", b"y")], "data": {"purpose": "batch"}}, 400),
        (form() | {"data": {"purpose": "batch", "expires_after[seconds]": "5"}}, 400),
        (form() | {"data": {"purpose": "batch", "x": "y" * 2000}}, 400),
    ],
)
async def test_a_wrong_upload_is_refused(tmp_path, kept, sent, status):
    async with batches_running(tmp_path) as (system, _):
        reply = await system.client.post(FILES, **sent)
        assert reply.status_code == status
        assert reply.json()["error"]["message"]
        assert kept() == []


async def test_an_upload_that_breaks_off_leaves_nothing(tmp_path, kept):
    async with batches_running(tmp_path) as (system, client):

        async def pieces():
            yield b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
            yield b"y" * 100_000
            await asyncio.sleep(0.3)
            raise ConnectionError

        headers = {"content-type": "multipart/form-data; boundary=x"}
        with pytest.raises(ConnectionError):
            await system.client.post(FILES, content=pieces(), headers=headers)
        await system.until(lambda: not kept())
        await upload(client, [line(1)])


async def test_a_file_may_be_kept_for_less(tmp_path):
    async with batches_running(tmp_path) as (_, client):
        file = await client.files.create(
            file=("in.jsonl", b"{}"),
            purpose="batch",
            expires_after={"anchor": "created_at", "seconds": 3600},
        )
        assert file.expires_at - file.created_at == 3600


async def test_a_name_says_nothing_of_where_a_file_is(tmp_path, kept):
    async with batches_running(tmp_path) as (_, client):
        file = await client.files.create(file=("../../x/in.jsonl", b"{}"), purpose="batch")
        assert file.filename == "in.jsonl"
        assert [path.name for path in kept()] == [file.id]


async def test_pages_of_others_may_not_use_the_disk(tmp_path):
    async with batches_running(tmp_path) as (system, _):
        headers = {"origin": "https://elsewhere.example"}
        reply = await system.client.post(FILES, **form(), headers=headers)
        assert reply.status_code == 403
