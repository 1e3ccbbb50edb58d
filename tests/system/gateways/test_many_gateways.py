"""On real Ray Serve two gateways are one to whoever asks, also when one is killed."""

import asyncio
import bisect
import contextlib
import random
import socket
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.systems.null_engine import MODEL
from benchmarks.systems.system import NullHeadway
from serving.capacity.service import free_ports
from serving.gateway.observe.state import ServiceState
from tests.support.running_gateway import CHAT

pytestmark = pytest.mark.timeout(180)

STEP_MS = 20
NUM_REQUESTS, NUM_TOKENS = 40, 10
Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class TwoGateways(NullHeadway):
    """Two gateways that share a port and have one each, before two engines."""

    def __init__(self) -> None:
        super().__init__("own", num_engines=2, num_gateways=2)
        self.metrics_port = _two_ports()

    def config(self, port: int, gateway_port: int) -> dict[str, Any]:
        config = super().config(port, gateway_port)
        args = config["applications"][0]["args"]
        args["gateway"]["metrics_port"] = self.metrics_port
        args["engine"]["args"] = {"step_ms": STEP_MS}
        return config

    def gateway(self, rank: int) -> psutil.Process:
        """Return the process that has this gateway's own port."""
        self.launches[0].refresh()
        for process in self.launches[0].living():
            with contextlib.suppress(psutil.Error):
                for each in process.net_connections("tcp"):
                    if (
                        each.status == psutil.CONN_LISTEN
                        and each.laddr.port == self.metrics_port + rank
                    ):
                        return process
        raise AssertionError(f"nobody listens for gateway {rank}")


def _two_ports() -> int:
    """Return a port that is free, as the next one is."""
    while True:
        (port,) = free_ports(1)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port + 1))
            return port


async def state_of(http: httpx.AsyncClient, query: str = "") -> ServiceState:
    reply = await http.get(f"/headway/state{query}")
    assert reply.status_code == 200, reply.text
    return msgspec.json.decode(reply.content, type=ServiceState)


async def ask(url: str, num_tokens: int) -> tuple[float, bool]:
    """Stream an answer on a new connection: seconds to its first token, and if it is whole."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "max_tokens": num_tokens,
    }
    ttft_s, is_whole = 0.0, False
    async with httpx.AsyncClient(base_url=url, timeout=60, verify=False) as http:
        await http.get("/health/live")  # the connection is there
        start_s = time.monotonic()
        with contextlib.suppress(httpx.HTTPError):
            async with http.stream("POST", CHAT, json=body) as reply:
                assert reply.status_code == 200
                async for line in reply.aiter_lines():
                    if not ttft_s and '"content":" ' in line:
                        ttft_s = time.monotonic() - start_s
                    is_whole |= line == "data: [DONE]"
    return ttft_s, is_whole


async def scrape(http: httpx.AsyncClient, port: int) -> tuple[Series, dict[str, str]]:
    series: Series = {}
    kinds = {}
    text = (await http.get(f"http://127.0.0.1:{port}/metrics")).text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            series[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
            kinds[sample.name] = family.type
    return series, kinds


def total(scrapes: list[Series], name: str, **labels: str) -> float:
    return sum(
        value
        for series in scrapes
        for (each, has), value in series.items()
        if each == name and labels.items() <= dict(has).items()
    )


async def until(condition: Callable[[], Any], timeout_s: float) -> Any:
    """Return the first truthy result."""
    async with asyncio.timeout(timeout_s):
        while not (found := await condition()):
            await asyncio.sleep(0.05)
    return found


async def test_two_gateways_are_one_to_whoever_asks_and_one_is_left():
    async with TwoGateways() as service:
        url = service.urls[0]
        async with httpx.AsyncClient(base_url=url, timeout=10) as http:
            await _scrapes_agree_with_clients(http, service)
            state = await state_of(http)
            assert state.outcomes["completed"] == 2 * NUM_REQUESTS
            assert sum(g.outcomes["completed"] for g in state.gateways.values()) == 2 * NUM_REQUESTS
            assert all(g.outcomes["completed"] > 0 for g in state.gateways.values())
            assert state.missing == {}
            usage = (await http.get("/headway/usage")).json()
            assert set(usage["gateways"]) == set(state.gateways)

            # What is ordered of one holds on both.
            order = {"policy": "headway", "ablate": ["order"]}
            reply = await http.post("/headway/policy", json=order)
            assert reply.json()["gateways"] == dict.fromkeys(state.gateways, order)
            drained, other = sorted(state.replicas)
            long = [asyncio.create_task(ask(url, 150)) for _ in range(16)]
            await until(lambda: _num_open(http, drained), 10)
            reply = await http.post(f"/headway/engines/{drained}/drain")
            assert [each["drains"] for each in reply.json()["gateways"].values()] == [True, True]
            assert all(is_whole for _, is_whole in await asyncio.gather(*long))
            drained_state = (await state_of(http)).replicas[drained]
            assert drained_state.ledger.num_open == 0
            quiet = drained_state.snapshot.num_output_tokens_total
            await asyncio.gather(*(ask(url, 2) for _ in range(16)))
            after = (await state_of(http)).replicas
            assert after[drained].snapshot.num_output_tokens_total == quiet
            assert [after[name].is_draining for name in (drained, other)] == [True, False]

        await _one_is_killed(service, drained)
    assert service.killed == []


async def _num_open(http: httpx.AsyncClient, engine: str) -> int:
    return (await state_of(http)).replicas[engine].ledger.num_open


async def _scrapes_agree_with_clients(http: httpx.AsyncClient, service: TwoGateways) -> None:
    """Scrape both gateways twice under load, and once when it is over."""
    rng, ports = random.Random(1), (service.metrics_port, service.metrics_port + 1)
    ttfts: list[float] = []

    async def one() -> None:
        await asyncio.sleep(rng.random())
        ttft_s, is_whole = await ask(service.urls[0], NUM_TOKENS)
        assert is_whole
        ttfts.append(ttft_s)

    async def load() -> None:
        await asyncio.gather(*(one() for _ in range(NUM_REQUESTS)))

    await load()  # then each has something to tell
    loading = asyncio.create_task(load())
    scrapes: list[list[Series]] = []
    for delay_s in (0.4, 0.4):
        await asyncio.sleep(delay_s)
        scrapes.append([(await scrape(http, port))[0] for port in ports])
    await loading
    last, kinds = [], {}
    for port in ports:
        series, kinds = await scrape(http, port)
        last.append(series)
    for earlier, later in ((scrapes[0], scrapes[1]), (scrapes[1], last)):
        for old, new in zip(earlier, later, strict=True):
            growing = [key for key in old if kinds[key[0]] in ("counter", "histogram")]
            assert len(growing) > 100
            assert [key for key in growing if new[key] < old[key]] == []
    assert total(last, "headway_requests_total", outcome="completed") == len(ttfts)
    assert total(last, "headway_generation_tokens_total") == len(ttfts) * NUM_TOKENS
    assert [{dict(labels)["gateway"] for _, labels in each} for each in last] == [{"0"}, {"1"}]
    counts: dict[float, float] = defaultdict(float)
    for series in last:
        for (name, labels), value in series.items():
            if name == "headway_time_to_first_token_seconds_bucket":
                counts[float(dict(labels)["le"])] += value
    # How near they are where engines take their time, `test_scrapes.py` looks at.
    ttfts.sort()
    assert counts[float("inf")] == len(ttfts)
    for bound, count in counts.items():
        assert count >= bisect.bisect_right(ttfts, bound)


async def _one_is_killed(service: TwoGateways, drained: str) -> None:
    """Kill a gateway: its connections end, the other one says so, and the next takes over."""
    url = service.urls[0]
    streams = [asyncio.create_task(ask(url, 150)) for _ in range(16)]
    before = await until(lambda: _look(url, lambda state: state.num_open_requests == 16), 10)
    gateways = {each.rank: each for each in before.gateways.values()}
    assert min(each.num_open_requests for each in gateways.values()) > 0
    service.gateway(1).kill()
    killed = gateways[1].gateway_id
    said = await until(lambda: _look(url, lambda state: killed in state.missing), 2)
    assert list(said.gateways) == [gateways[0].gateway_id]
    results = await asyncio.gather(*streams)
    assert sum(is_whole for _, is_whole in results) == gateways[0].num_open_requests

    def is_back(state: ServiceState) -> bool:
        ready = [each for each in state.gateways.values() if len(each.replicas) == 2]
        return len(ready) == 2 and not state.missing

    after = await until(lambda: _look(url, is_back), 60)
    (new,) = (each for name, each in after.gateways.items() if name not in before.gateways)
    assert (new.rank, new.policy, new.ablate, new.drained) == (1, "headway", ["order"], [drained])
    assert new.replicas[drained].is_draining


async def _look(url: str, is_so: Callable[[ServiceState], bool]) -> ServiceState | None:
    """Return the state, as a new connection gets it, if that is so."""
    with contextlib.suppress(httpx.HTTPError):
        async with httpx.AsyncClient(base_url=url, timeout=5, verify=False) as http:
            state = await state_of(http)
            return state if is_so(state) else None
    return None
