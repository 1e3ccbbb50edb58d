"""Real Ray Serve, emulated engines: engines come before they are missed, and go without an abort.

Two models in one service, each with bounds of its own: `busy` has one engine or two, `rare` none or
one.
"""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from serving.capacity.service import Service
from serving.gateway.observe.state import ServiceState
from tests.support.running_gateway import CHAT

pytestmark = pytest.mark.timeout(300)

# One core, emulated: 400 words are half a second of an engine, so that 2 requests/s are its end.
ENGINE = {
    "factory": "serving.engine.emulated.engine:EmulatedEngine",
    "args": {"profile": "smollm2-cpu"},
}
WORDS = "word " * 400
TARGET_S = 2.0  # and 2 ms for each token: what is promised
PROMISE_S = TARGET_S + 0.8
QUICK = {"start_s": 3, "keep_s": 3, "zero_after_s": 4, "season_s": 0}
MODELS = [
    {"served_model_name": "busy", "replicas": {"min": 1, "max": 2, **QUICK}},
    {"served_model_name": "rare", "replicas": {"min": 0, "max": 1, **QUICK}},
]
NAMES = {"busy", "rare"}
_NUMBERS = itertools.count()


class Scaled(Service):
    """A service of models whose engines come and go."""

    def config(self, port: int, gateway_port: int) -> dict[str, Any]:
        config = super().config(port, gateway_port)
        args = config["applications"][0]["args"]
        args |= {"models": MODELS, "device": "cpu", "engine": ENGINE}
        args["router"] = {"ttft_target_base_s": TARGET_S}
        args["gateway"]["keepalive_s"] = 0.5
        del args["replicas"]
        return config

    async def engines(self, model: str) -> list[str]:
        """The ids of a model's engines."""
        replicas = (await self.state()).replicas
        return [name for name, each in replicas.items() if each.info.model == model]


class Reply:
    """What came of one streamed request."""

    def __init__(self, sent_s: float) -> None:
        self.sent_s = sent_s
        self.ttft_s = 0.0
        self.num_chunks = 0
        self.comments: list[str] = []
        self.end = ""

    @property
    def is_whole(self) -> bool:
        return self.end == "data: [DONE]"


async def ask(http: httpx.AsyncClient, model: str, num_tokens: int, words: str = "hi") -> Reply:
    # No two begin alike: what is cached of one needs no prefill in the next.
    messages = [{"role": "user", "content": f"{next(_NUMBERS)} {words}"}]
    body = {"model": model, "messages": messages, "stream": True, "max_tokens": num_tokens}
    reply = Reply(time.monotonic())
    async with http.stream("POST", CHAT, json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith(":"):
                reply.comments.append(line)
            elif line:
                reply.end = line
                if line.startswith("data: {"):
                    assert "error" not in json.loads(line[6:])
                    reply.ttft_s = reply.ttft_s or time.monotonic() - reply.sent_s
                    reply.num_chunks += 1
    return reply


class Traffic:
    """Requests that come one after the other, whatever becomes of those before them."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.rate = 0.5  # per second
        self.asked: list[asyncio.Task[Reply]] = []
        self._http = http

    @asynccontextmanager
    async def going_on(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._send())
        yield
        task.cancel()

    async def _send(self) -> None:
        while True:
            self.asked.append(asyncio.create_task(ask(self._http, "busy", 40, WORDS)))
            await asyncio.sleep(1.0 / self.rate)


def works_while_it_is_emptied(state: ServiceState) -> bool:
    """Whether an engine that gets nothing new has yet to end what it has."""
    return state.scalers["busy"].num_emptying > 0 and any(
        replica.is_draining and replica.snapshot.num_running_reqs > 0
        for replica in state.replicas.values()
    )


@asynccontextmanager
async def started() -> AsyncIterator[tuple[Scaled, httpx.AsyncClient]]:
    async with (
        Scaled(1, {}) as service,
        httpx.AsyncClient(base_url=service.urls[0], timeout=90) as http,
    ):
        yield service, http


async def test_engines_come_in_time_and_go_when_they_are_empty(record_property):
    async with started() as (service, http):
        async with asyncio.timeout(60):
            for number in (1, 0):  # each model begins with an engine; what nobody asks for ends
                while len(await service.engines("rare")) != number:
                    await asyncio.sleep(0.1)
        # From zero: all that come at once wait for one engine, and are told so.
        assert len(await service.engines("busy")) == 1
        assert {card["id"] for card in (await http.get("/v1/models")).json()["data"]} == NAMES
        firsts = await asyncio.gather(*(ask(http, "rare", 5) for _ in range(8)))
        for first in firsts:
            assert first.is_whole
            assert any("waiting for an engine to start" in each for each in first.comments)
        # A ramp: what one engine can do, until there are two; then what only two can.
        traffic = Traffic(http)
        async with traffic.going_on(), asyncio.timeout(90):
            for traffic.rate in (0.6, 0.8, 1.0, 1.2):
                await asyncio.sleep(2.5)
            while len(await service.engines("busy")) < 2:
                await asyncio.sleep(0.1)
            num_before = len(traffic.asked)
            traffic.rate = 2.4
            await asyncio.sleep(6.0)
        # Long ones, in both engines, outlast the time after which one is emptied; none is cut.
        going_on = [asyncio.create_task(ask(http, "busy", 450)) for _ in range(6)]
        async with asyncio.timeout(60):
            while not works_while_it_is_emptied(await service.state()):
                await asyncio.sleep(0.1)
        replies = await asyncio.gather(*traffic.asked)
        assert all(each.is_whole and each.num_chunks >= 40 for each in replies)
        long_ones = await asyncio.gather(*going_on)
        assert all(each.is_whole and each.num_chunks >= 450 for each in long_ones)
        async with asyncio.timeout(60):
            while len(await service.engines("busy")) > 1 or await service.engines("rare"):
                await asyncio.sleep(0.2)
        outcomes = (await service.state()).outcomes
        assert {name: number for name, number in outcomes.items() if number} == {
            "completed": len(firsts) + len(replies) + len(long_ones)
        }
        slowest = max(each.ttft_s for each in replies)
        record_property(
            "figures",
            f"{len(replies)} requests, {num_before} before the second engine; slowest first token "
            f"{slowest:.2f} s of {PROMISE_S} s; from zero after {firsts[0].ttft_s:.1f} s",
        )
        assert slowest < PROMISE_S
