"""Two scrapes of two gateways under load, before emulated engines: what do their numbers mean?"""

import asyncio
import bisect
import random
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Mapping

import httpx
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client import Counter as TheirCounter
from prometheus_client.parser import text_string_to_metric_families

from serving.engine.emulated.engine import EmulatedArgs, EmulatedEngine
from serving.gateway.observe.metrics.engines import merge
from serving.gateway.observe.metrics.requests import LATENCY_BUCKETS_S
from serving.stream.server import StreamServer
from tests.support.running_gateway import CHAT, System, running

NUM_REQUESTS, NUM_TOKENS = 24, 12
Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def scrape(system: System, path: str = "/metrics") -> tuple[Series, dict[str, str]]:
    """All series of a gateway, and the type of each by its name."""
    reply = await system.client.get(path)
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    return series_of(reply.text)


def series_of(text: str) -> tuple[Series, dict[str, str]]:
    series: Series = {}
    kinds = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in series
            series[key], kinds[sample.name] = sample.value, family.type
    return series, kinds


def total(scrapes: list[Series], name: str, **labels: str) -> float:
    """The sum over gateways of what has these labels."""
    return sum(
        value
        for series in scrapes
        for (each, has), value in series.items()
        if each == name and labels.items() <= dict(has).items()
    )


async def ask(client: httpx.AsyncClient, rng: random.Random) -> tuple[str, float]:
    """Send a prompt. Return its class, and the time to its first token as the client sees it."""
    kind = rng.choice(("interactive", "standard"))
    body = {
        "model": "llama-3.1-8b",
        "messages": [{"role": "user", "content": f"{rng.random()} " * rng.randint(1, 400)}],
        "max_tokens": NUM_TOKENS,
        "stream": True,
    }
    await asyncio.sleep(rng.random())
    start_s, first_s = time.monotonic(), 0.0
    async with client.stream("POST", CHAT, json=body, headers={"x-headway-class": kind}) as reply:
        assert reply.status_code == 200
        async for _ in reply.aiter_bytes():
            first_s = first_s or time.monotonic()
    return kind, first_s - start_s


async def load(systems: list[System], seed: int) -> list[tuple[str, float]]:
    rng = random.Random(seed)
    return await asyncio.gather(
        *(ask(systems[i % len(systems)].client, rng) for i in range(NUM_REQUESTS))
    )


@pytest.fixture
async def systems():
    """Two gateways before the same two engines."""
    engines = [EmulatedEngine(EmulatedArgs(), "llama-3.1-8b", rank) for rank in range(2)]
    servers = [StreamServer(engine, 65536) for engine in engines]
    members = {}
    for number, server in enumerate(servers):
        host, port = await server.listen("127.0.0.1")
        members[f"e{number}"] = {"host": host, "port": port, "secret": server.secret}
    async with running(num_engines=0) as one, running(num_engines=0, rank=1) as other:
        for system in (one, other):
            system.gateway.driver.engines.set_members(members)
            await system.until(lambda s=system: len(s.gateway.driver.engines.infos) == 2)
        yield [one, other]
    for server, engine in zip(servers, engines, strict=True):
        server.close()
        await engine.shutdown()


async def test_two_scrapes_of_two_gateways(systems):
    asked = await load(systems, seed=1)
    before = [(await scrape(system))[0] for system in systems]
    asked += await load(systems, seed=2)
    after, kinds = [], {}
    for system in systems:
        series, kinds = await scrape(system)
        after.append(series)

    # Counters, and what histograms count, only grow, and do not go.
    for old, new in zip(before, after, strict=True):
        growing = [key for key in old if kinds[key[0]] in ("counter", "histogram")]
        assert len(growing) > 100
        assert [key for key in growing if new[key] < old[key]] == []

    # Sums over gateways are what clients have asked for and got.
    assert total(before, "headway_requests_total", outcome="completed") == NUM_REQUESTS
    for kind, count in Counter(kind for kind, _ in asked).items():
        of_class = {"class": kind}
        assert total(after, "headway_requests_total", outcome="completed", **of_class) == count
        first = "headway_time_to_first_token_seconds_count"
        assert total(after, first, **of_class) == count
    assert total(after, "headway_requests_total") == len(asked)
    assert total(after, "headway_http_responses_total", code="200") == len(asked)
    assert total(after, "headway_generation_tokens_total") == len(asked) * NUM_TOKENS
    assert total(after, "headway_time_per_output_token_seconds_count") == len(asked)
    assert total(after, "headway_request_held_seconds_count") == len(asked)
    assert [total([each], "headway_requests_total") for each in after] == [NUM_REQUESTS] * 2
    # An engine tells every gateway of all that it does.
    for series in after:
        assert total([series], "headway_engine_generation_tokens_total") == len(asked) * NUM_TOKENS

    # The histogram is of what clients have seen, less their way to the gateway and back: for each
    # bound at least as many are within it, and the median is in their bucket, or the one below.
    counts = defaultdict(float)
    for series in after:
        for (name, labels), value in series.items():
            if name == "headway_time_to_first_token_seconds_bucket":
                counts[float(dict(labels)["le"])] += value
    theirs = sorted(ttft_s for _, ttft_s in asked)
    for bound, count in counts.items():
        assert count >= bisect.bisect_right(theirs, bound)
    median = bisect.bisect_left(LATENCY_BUCKETS_S, statistics.median_low(theirs))
    assert median - 1 <= bucket_of_quantile(counts, 0.5) <= median


def bucket_of_quantile(counts: Mapping[float, float], share: float) -> int:
    """The number of the bucket in which a quantile is; `counts` are cumulative."""
    bounds = sorted(counts)
    assert bounds == [*LATENCY_BUCKETS_S, float("inf")]
    return next(i for i, bound in enumerate(bounds) if counts[bound] >= share * counts[bounds[-1]])


async def test_engines_own_metrics_are_passed_on_under_their_ids(systems):
    await load(systems, seed=3)
    one, other = [await scrape(system, "/metrics/engines") for system in systems]
    assert one[0].keys() == other[0].keys()  # whichever is asked
    series, kinds = one
    tokens = "vllm:generation_tokens_total"
    assert total([series], tokens) == NUM_REQUESTS * NUM_TOKENS
    for engine in ("e0", "e1"):
        assert total([series], "headway_engine_metrics_up", engine=engine) == 1
        assert total([series], tokens, engine=engine, model_name="llama-3.1-8b") > 0
    assert kinds[tokens] == "counter"
    assert kinds["vllm:num_requests_running"] == "gauge"


async def test_an_engine_that_does_not_answer_is_said_to_be_down(systems, monkeypatch):
    monkeypatch.setattr("serving.gateway.observe.metrics.engines._TIMEOUT_S", 0.05)
    engines = systems[0].gateway.driver.engines
    asked = engines.ask

    def ask_the_other(replica_id, method, path, headers, body):
        return asked(replica_id, method, "/nothing" if replica_id == "e0" else path, headers, body)

    monkeypatch.setattr(engines, "ask", ask_the_other)
    series, _ = await scrape(systems[0], "/metrics/engines")
    assert total([series], "headway_engine_metrics_up", engine="e0") == 0
    assert total([series], "headway_engine_metrics_up", engine="e1") == 1
    assert {dict(labels)["engine"] for (name, labels) in series if name.startswith("vllm:")} == {
        "e1"
    }


def test_what_is_passed_on_is_what_the_library_reads():
    """Texts as vLLM has them: its own label `engine`, odd values of labels, none at all."""
    texts = {}
    for engine, count in (("e0", 3), ("e1", 5)):
        registry = CollectorRegistry()
        times = Histogram("vllm:t_seconds", "Time", ("model_name", "engine"), registry=registry)
        times.labels('a "b" \\ ,engine="0" {}', "0").observe(count)
        TheirCounter("plain", "No labels", registry=registry).inc(count)
        TheirCounter("only", "One label", ("engine",), registry=registry).labels("1").inc(count)
        texts[engine] = generate_latest(registry).decode()
    merged, _ = series_of(merge(texts))
    expected: Series = {}
    for engine, text in texts.items():
        for (name, labels), value in series_of(text)[0].items():
            if not name.endswith("_created"):
                has = {**dict(labels), "engine": engine}
                expected[name, tuple(sorted(has.items()))] = value
    assert merged == expected
    assert len(expected) > 2 * 15
    assert merge({}) == ""
