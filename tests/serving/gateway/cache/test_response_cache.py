"""The response cache over real HTTP: hits, misses, tenants, bounds and settings."""

import asyncio
import random
import statistics
import time

import msgspec
import pytest
import yaml

from serving.gateway.tenants.keys import KeysFile, make_key
from tests.serving.gateway.cache.asking import ON, ask, num_started
from tests.support.fakes import INFO
from tests.support.running_gateway import running


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


async def test_another_adapter_of_the_same_name_is_another_model():
    async with running(num_engines=0, cache=ON) as system:
        info = msgspec.structs.replace(INFO, max_loras=1).with_adapters({"french": "/old"})
        engine = await system.add_engine(info=info)

        async def verdict() -> str:
            return (await ask(system, model="french")).headers["x-headway-cache"]

        assert [await verdict(), await verdict()] == ["miss", "hit"]
        engine.adapter_paths = {"french": "/new"}
        engine._on_step()
        infos = system.gateway.driver.engines.infos
        await system.until(lambda: infos["r0"].adapters == {"french": "/new"})
        assert [await verdict(), await verdict()] == ["miss", "hit"]


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


async def test_a_failure_is_told_to_all_and_not_kept():
    async with running(num_engines=1, cache=ON) as system:
        system.engines[0].chunk = b'data: {"error": {"message": "EngineDeadError"}}\n\n'
        assert (await ask(system)).headers["x-headway-cache"] == "miss"
        assert (await ask(system)).headers["x-headway-cache"] == "miss"
        assert system.gateway.cache.state().num_stored == 0


async def test_what_a_provider_answered_is_not_kept():
    async with running(num_engines=1, cache=ON) as system:
        system.engines[0].headers.append((b"x-headway-provider", b"elsewhere"))
        assert [(await ask(system)).headers["x-headway-cache"] for _ in range(2)] == ["miss"] * 2


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
        assert system.gateway.tenants.usage()["a"].num_requests == usage.num_requests + 51


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
                peak = max(peak, state.num_stored_bytes + state.num_flight_bytes)
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
        assert state.num_evicted > 0
        assert (state.num_flights, state.num_flight_bytes) == (0, 0)
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
        watch = system.gateway.file_watches["watch_file"]
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
        assert system.gateway.cache.state().num_stored == 0
