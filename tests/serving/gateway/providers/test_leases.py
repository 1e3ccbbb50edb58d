"""A provider with limits under three times the load it takes: half an hour of virtual time.

Everything is real but the clock: clients, gateways and the provider talk HTTP.
"""

import asyncio
import contextlib
import random
import time

import aiohttp
import pytest

from serving.config import parse
from serving.gateway.app import Gateway
from serving.gateway.http.listener import Listener
from serving.gateway.providers.leases import LeaseKeeper
from tests.support import virtual_time
from tests.support.provider_server import MODEL, ProviderServer, listening
from tests.support.running_gateway import CHAT, free_port

pytestmark = pytest.mark.timeout(300)

RPM, TPM = 40, 6000
MINUTES = 30


def make_server(**fields) -> ProviderServer:
    """A provider with both limits; first tokens take 0.4 s, replies 2 s."""
    return ProviderServer(rpm=RPM, tpm=TPM, ttft_s=0.4, token_s=0.5, max_events=3, **fields)


async def _load(url: str, rate_per_s: float, rng: random.Random, end_s: float) -> list[int]:
    """Statuses of requests that come in bursts (gamma, coefficient of variation 3), open loop."""
    statuses = []

    async def ask(session: aiohttp.ClientSession, num_words: int, num_tokens: int) -> None:
        body = {
            "model": "far",
            "messages": [{"role": "user", "content": " ".join(["word"] * num_words)}],
            "max_tokens": num_tokens,
            "stream": True,
        }
        async with session.post(url + CHAT, json=body) as reply:
            await reply.read()
            statuses.append(reply.status)

    shape = 1 / 3.0**2
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        asyncio.TaskGroup() as group,
    ):
        while time.monotonic() < end_s:
            await asyncio.sleep(rng.gammavariate(shape, 1 / (shape * rate_per_s)))
            group.create_task(ask(session, rng.randint(5, 150), rng.randint(10, 120)))
    return statuses


async def _drive(
    num_gateways: int, server: ProviderServer, minutes: int, halve_at_s: float | None = None
) -> list[int]:
    """Run the load through so many gateways; returns the statuses that clients saw."""
    keeper = LeaseKeeper()

    async def send_update(*arguments) -> bytes:
        await asyncio.sleep(0.001)  # a call of an actor takes about that
        return keeper.answer_update(*arguments)

    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(listening(server))
        urls = []
        for number in range(num_gateways):
            port = free_port()
            provider = {
                "name": "p",
                "url": server.url,
                "models": {"far": MODEL},
                "keys": [{"rpm": RPM, "tpm": TPM}],
            }
            config = parse(
                {
                    "gateway": {"port": port},
                    "router": {"max_hold_s": 60.0},
                    "providers": [provider],
                }
            )
            gateway = Gateway(config, f"g{number}", send_update if num_gateways > 1 else None)
            listener = Listener(gateway.app, config.gateway)
            await listener.start()
            stack.push_async_callback(listener.stop)
            stack.callback(gateway.close)
            urls.append(f"http://127.0.0.1:{port}")
        end_s = time.monotonic() + minutes * 60.0
        if halve_at_s is not None:
            asyncio.get_running_loop().call_later(halve_at_s, _halve, server)
        rate_per_s = 3.0 * RPM / 60.0 / num_gateways
        statuses = await asyncio.gather(
            *(
                _load(url, rate_per_s, random.Random(number), end_s)
                for number, url in enumerate(urls)
            )
        )
    return [status for each in statuses for status in each]


def _halve(server: ProviderServer) -> None:
    server.rpm, server.tpm = server.rpm // 2, server.tpm // 2


def _used_share(server: ProviderServer) -> float:
    """Of the limit that binds."""
    return max(server.num_taken / (RPM * MINUTES), server.num_tokens_taken / (TPM * MINUTES))


@pytest.mark.parametrize("num_gateways", [1, 3])
def test_half_an_hour_of_triple_load_meets_no_429_and_leaves_nothing_unused(num_gateways):
    server = make_server()
    statuses = virtual_time.run(_drive(num_gateways, server, MINUTES))
    print(f"{len(statuses)} requests, {server.num_refused} refused, {_used_share(server):.3f} used")
    assert server.num_refused == 0
    # The server's own windows say what was taken. A window that slides lets a whole minute's worth
    # through at once in the beginning, so half an hour has room for 31 minutes'.
    assert 0.95 <= _used_share(server) <= (MINUTES + 1) / MINUTES
    assert set(statuses) <= {200, 429, 503}  # ours: the queue was full, or the wait too long
    assert statuses.count(200) == server.num_taken


@pytest.mark.parametrize(("num_gateways", "sends_headers"), [(1, False), (3, True)])
def test_limits_that_are_halved_in_secret_are_found(num_gateways, sends_headers):
    server = make_server(sends_headers=sends_headers)
    virtual_time.run(_drive(num_gateways, server, 20, halve_at_s=600.0))
    print(f"{server.num_refused} refused, at {server.refusals_s}")
    assert server.num_refused <= 3
    assert all(at_s < 600.0 + 300.0 for at_s in server.refusals_s)
