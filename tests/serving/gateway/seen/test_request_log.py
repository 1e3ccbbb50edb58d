"""What the log of requests says: a line for each, whatever came of it, and no word of a prompt."""

import asyncio
import json
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import httpx
import msgspec
import pytest

from serving.config import LogConfig
from serving.gateway.http.errors import ApiError
from serving.gateway.observe.observer import reason_of
from serving.gateway.observe.request_log import Clock, RequestLine, RequestLog, in_words
from serving.gateway.tenants.keys import KeysFile, make_key
from tests.support.running_gateway import CHAT, running

SECRET = "my secret words"


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "requests-0.log").read_text().splitlines()]


def asked(system, **fields) -> dict:
    return system.chat(messages=[{"role": "user", "content": SECRET}], **fields)


async def logged(system, folder, num_lines: int) -> list[dict]:
    """The lines, once there are so many."""
    path = folder / "requests-0.log"
    await system.until(lambda: path.read_text().count("\n") >= num_lines)
    found = lines(folder)
    assert len(found) == num_lines
    return found


async def test_a_stream_that_is_answered(tmp_path):
    before = datetime.now(UTC)
    async with running(num_engines=1, log={"dir": str(tmp_path)}) as system:
        reply = await system.client.post(
            CHAT,
            json=asked(system, max_tokens=3),
            headers={"x-request-id": "mine", "x-headway-class": "interactive"},
        )
        assert reply.status_code == 200
        [line] = await logged(system, tmp_path, 1)
    assert before < datetime.fromisoformat(line.pop("time")) < before + timedelta(seconds=10)
    times = {name: line.pop(name) for name in list(line) if name.endswith("_s")}
    assert line == {
        "gateway": 0,
        "id": "mine",
        "path": CHAT,
        "status": 200,
        "outcome": "completed",
        "model": "fake-model",
        "class": "interactive",
        "stream": True,
        "engines": ["r0"],
    }  # and nothing of tokens, which a fake does not count
    assert 0 <= times["held_s"] <= times["ttft_s"] <= times["total_s"] < 10
    assert times["held_s"] + times["answered_in_s"] == pytest.approx(times["ttft_s"], abs=1e-5)
    assert times["predicted_ttft_s"] > 0


async def test_what_is_refused_fails_or_is_left_has_a_line_too(tmp_path):
    with KeysFile(tmp_path / "keys.json") as file:
        text, key = make_key("acme")
        file.keys.append(key)
        file.save()
    key = {"authorization": f"Bearer {text}"}
    async with running(
        num_engines=1,
        log={"dir": str(tmp_path)},
        auth={"keys_file": str(tmp_path / "keys.json")},
        router={"max_held_requests": 0},
    ) as system:
        post, [engine] = system.client.post, system.engines
        for headers, body, status in (
            ({}, asked(system), 401),
            (key, asked(system, n="many"), 400),
            (key, asked(system, model="unknown"), 404),
        ):
            reply = await post(CHAT, json=body, headers=headers)
            assert reply.status_code == status
        engine.status = 400
        await post(CHAT, json=asked(system), headers=key)
        engine.status = 200
        engine.gate.clear()
        with pytest.raises(httpx.ReadTimeout):
            await post(CHAT, json=asked(system), headers=key, timeout=0.2)
        found = await logged(system, tmp_path, 5)
    told = [
        (line.get("status", 0), line["outcome"], line.get("reason"), line.get("tenant"))
        for line in found
    ]
    assert told == [
        (401, "rejected", "invalid_api_key", None),
        (400, "rejected", "Bad Request", "acme"),
        (404, "rejected", "NotFoundError", "acme"),
        (400, "completed", None, "acme"),  # by an engine
        (0, "reneged", "the client left", "acme"),
    ]


async def test_the_cache_has_a_say(tmp_path):
    async with running(log={"dir": str(tmp_path)}, cache={"enabled": True}) as system:
        for _ in range(2):
            await system.client.post(CHAT, json=asked(system, temperature=0))
        miss, hit = await logged(system, tmp_path, 2)
    assert (miss["cache"], miss["outcome"], len(miss["engines"])) == ("miss", "completed", 1)
    assert (hit["cache"], hit["outcome"], "engines" in hit) == ("hit", "completed", False)


async def test_an_engine_that_is_lost_is_named_beside_the_one_that_went_on(tmp_path):
    async with running(num_engines=3, log={"dir": str(tmp_path)}) as system:
        for engine in system.engines:
            engine.gate.clear()
        asking = asyncio.create_task(system.client.post(CHAT, json=asked(system)))
        await system.until(lambda: system.num_engine_streams == 1)
        first = next(i for i, server in enumerate(system.servers) if server.num_streams)
        system.servers[first].close()
        for engine in system.engines:
            engine.gate.set()
        assert (await asking).status_code == 200
        [line] = await logged(system, tmp_path, 1)
    assert line["engines"][0] == f"r{first}"
    assert len(set(line["engines"])) == 2


@pytest.mark.parametrize(("bodies", "is_there"), [(False, False), (True, True)])
async def test_no_word_of_a_prompt_unless_asked_for(tmp_path, bodies, is_there):
    async with running(log={"dir": str(tmp_path), "bodies": bodies}) as system:
        await system.client.post(CHAT, json=asked(system))
        await system.client.post(CHAT, json=asked(system, n=SECRET))
        await system.client.post(CHAT, content=SECRET)
        await logged(system, tmp_path, 3)
    assert (SECRET in (tmp_path / "requests-0.log").read_text()) == is_there


async def test_no_folder_no_log_and_none_of_requests_where_that_is_not_wanted(tmp_path):
    async with running(log={"dir": str(tmp_path), "requests": False}) as system:
        await system.client.post(CHAT, json=asked(system))
    assert list(tmp_path.iterdir()) == []


def test_reasons_do_not_quote_what_was_asked():
    assert reason_of(ApiError(400, f"n: {SECRET} is no number", param="n")) == "BadRequestError"
    assert reason_of(ValueError(SECRET)) == "ValueError"
    assert reason_of(None) == ""


LINE = RequestLine(
    time="2026-01-02T03:04:05.678901Z",
    gateway=1,
    id='a b"c=\n',
    path=CHAT,
    status=200,
    outcome="completed",
    model="m",
    engines=("r0", "provider p"),
    held_s=0.123456,
    stream=True,
)


def test_a_line_in_words():
    assert in_words(LINE) == (
        "2026-01-02T03:04:05.678901Z 200 completed /v1/chat/completions gateway=1 "
        'id="a b\\"c=\\n" model=m stream=True engines="r0,provider p" held_s=0.1235'
    )


async def test_lines_are_put_aside_by_size_and_none_is_lost(tmp_path):
    config = LogConfig(dir=tmp_path / "new", max_bytes=4096, num_kept=2, format="text")
    log = RequestLog(config, 1)
    for _ in range(60):
        log.write(lambda: LINE)
        log.flush()
    log.close()
    log.write(lambda: LINE)  # over while the gateway stops
    paths = sorted((tmp_path / "new").iterdir())
    assert [path.name for path in paths] == [f"requests-1.log{end}" for end in ("", ".1", ".2")]
    texts = [path.read_text() for path in paths]
    assert sum(text.count("\n") for text in texts) == 61
    assert all(text.endswith("\n") for text in texts)
    assert max(map(len, texts)) < 4096 + 2 * len(in_words(LINE))


async def test_lines_wait_for_a_second_at_most(tmp_path):
    log = RequestLog(LogConfig(dir=tmp_path), 0)
    log.write(lambda: LINE)
    assert lines(tmp_path) == []
    async with asyncio.timeout(5):
        while not lines(tmp_path):
            await asyncio.sleep(0.05)
    assert lines(tmp_path)[0]["id"] == LINE.id


async def test_a_disk_that_is_full_stops_nobody(tmp_path, caplog, monkeypatch):
    log = RequestLog(LogConfig(dir=tmp_path), 0)

    def write(text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log._file, "stream", SimpleNamespace(tell=lambda: 0, write=write))
    log.write(lambda: LINE)
    log.flush()
    assert "1 lines of the request log are lost: [Errno 28]" in caplog.text


async def test_a_line_that_cannot_be_made_costs_no_other(tmp_path, caplog):
    def fails() -> RequestLine:
        raise ValueError("no such line")

    log = RequestLog(LogConfig(dir=tmp_path), 0)
    for line in (fails, lambda: LINE, lambda: msgspec.structs.replace(LINE, model="\ud800")):
        log.write(line)
    log.flush()
    assert [line["id"] for line in lines(tmp_path)] == [LINE.id]
    assert caplog.text.count("a line of the request log is lost") == 2


async def test_a_file_that_could_not_be_put_aside_is_later(tmp_path, caplog, monkeypatch):
    log = RequestLog(LogConfig(dir=tmp_path, max_bytes=4096), 0)

    def rename(source: str, target: str) -> None:
        raise OSError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(log._file, "rotate", rename)
        for _ in range(60):
            log.write(lambda: LINE)
            log.flush()
    assert "1 lines of the request log are lost: [Errno 13]" in caplog.text
    for _ in range(2):
        log.write(lambda: LINE)
        log.flush()
    assert len(lines(tmp_path)) == 2
    assert (tmp_path / "requests-0.log.1").exists()


def test_times_are_written_as_the_library_writes_them():
    clock = Clock()
    for now_s in (1.5, 1.999999, 1767323045.678901, 1767323045.0, 1767323046.000001, 1e9):
        expected = datetime.fromtimestamp(int(now_s), UTC).strftime("%Y-%m-%dT%H:%M:%S")
        text = clock.text(now_s)
        assert text.startswith(expected)
        assert abs(datetime.fromisoformat(text).timestamp() - now_s) < 2e-6
