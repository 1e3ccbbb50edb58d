"""Several models on real Ray Serve: they do not disturb each other, and one can come and go."""

import asyncio
import itertools
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import yaml

from serving.capacity.service import Service
from tests.support.running_gateway import CHAT
from tests.support.tiny_model import tiny_model

pytestmark = pytest.mark.timeout(300)

# One core, emulated: long prompts take seconds, so that requests are held.
EMULATED = {"factory": "serving.engine.emulated.engine:EmulatedEngine"}
SLOW = {**EMULATED, "args": {"profile": "smollm2-cpu", "tokens": 8}, "drain_timeout_s": 60}
WORD = "word "
_NUMBERS = itertools.count()


class Models(Service):
    """A service of several models, whose config file can be edited."""

    def __init__(self, num_engines: int, models: list[dict[str, Any]], **args: Any) -> None:
        super().__init__(num_engines, {"device": "cpu", **args})
        self.models = models

    def config(self, port: int, gateway_port: int) -> dict[str, Any]:
        config = super().config(port, gateway_port)
        config["applications"][0]["args"] |= {"models": self.models, "replicas": 1}
        return config

    def edit(self, models: list[dict[str, Any]]) -> None:
        path = Path(self._folder.name) / "config.yaml"
        content = yaml.safe_load(path.read_text())
        content["applications"][0]["args"]["models"] = models
        path.write_text(yaml.safe_dump(content))

    async def until_told(self, words: str, timeout_s: float = 60.0) -> None:
        """Return once the launcher has said something."""
        async with asyncio.timeout(timeout_s):
            while words not in self.launches[0].log_tail():
                await asyncio.sleep(0.1)

    async def listed(self) -> list[str]:
        """The models that the gateway names."""
        return [card["id"] for card in json.loads(await self.ask("/v1/models"))["data"]]

    async def held_tokens(self) -> dict[str, int]:
        """Prompt tokens that wait, by the names of models; of those for which some do."""
        return (await self.state()).held.num_tokens_by_model

    async def pids(self) -> dict[str, set[int]]:
        """The processes of the engines by model."""
        found: dict[str, set[int]] = {}
        for replica in (await self.state()).replicas.values():
            found.setdefault(replica.info.model, set()).add(replica.info.pid)
        return found


class Reply:
    """What came of one streamed request."""

    def __init__(self, status: int, is_whole: bool, ttft_s: float) -> None:
        self.status, self.is_whole, self.ttft_s = status, is_whole, ttft_s


async def ask(http: httpx.AsyncClient, model: str, num_words: int = 1, **more: Any) -> Reply:
    # No two begin alike: what is cached of one needs no prefill in the next.
    messages = [{"role": "user", "content": f"{next(_NUMBERS)} " + WORD * num_words}]
    body = {"model": model, "messages": messages, "stream": True, "max_tokens": 8, **more}
    start_s, first_s, last = time.monotonic(), 0.0, ""
    async with http.stream("POST", CHAT, json=body) as reply:
        async for line in reply.aiter_lines():
            if line:
                first_s = first_s or time.monotonic() - start_s
                last = line
        return Reply(reply.status_code, last == "data: [DONE]", first_s)


async def ask_on(http: httpx.AsyncClient, model: str, num_words: int) -> None:
    """Ask again and again, for ever."""
    while True:
        if (await ask(http, model, num_words)).status != 200:
            await asyncio.sleep(0.2)


ROUTES = {
    "auto": {
        "models": {"small": {"quality": 1, "cost": 1}, "large": {"quality": 3, "cost": 8}},
        "rules": [
            {"name": "code", "when": {"asks": ["code"]}, "models": ["large", "small"]},
            {"models": ["small", "large"], "prefer": "cheapest"},
        ],
    }
}


async def chosen(
    http: httpx.AsyncClient, text: str, model: str = "auto"
) -> tuple[str, str, httpx.Response]:
    """Ask for a route. Return which model has answered, and why that one."""
    messages = [{"role": "user", "content": text}]
    body = {"model": model, "messages": messages, "max_tokens": 4}
    reply = (await http.post(CHAT, json=body)).raise_for_status()
    return reply.json()["model"], reply.headers.get("x-headway-why", ""), reply


def emulated(name: str, **more: Any) -> dict[str, Any]:
    return {"served_model_name": name, "engine": SLOW, **more}


async def test_models_come_and_go_by_an_edit_and_nothing_is_dropped():
    """One that cannot start disturbs nobody; one that is removed answers what it was asked."""
    bad = {"served_model_name": "bad", "engine": {"factory": "nowhere:Engine"}}
    async with (
        Models(2, [emulated("a"), emulated("b", aliases=["bee"]), bad]) as service,
        httpx.AsyncClient(base_url=service.urls[0], timeout=90) as http,
    ):
        await service.until_told("ready after")
        assert "model bad cannot start: ModuleNotFoundError" in service.launches[0].log_tail()
        async with asyncio.timeout(30):  # a gateway looks for what could not start now and then
            while (reply := await http.post(CHAT, json={"model": "bad", "messages": []})).is_error:
                if reply.status_code == 503:
                    break
                await asyncio.sleep(0.2)
        assert "`bad` could not be started: ModuleNotFoundError" in reply.text
        before = await service.pids()
        asked = [
            asyncio.create_task(ask(http, name, num_words=800)) for name in ("a", "bee", "b") * 6
        ]
        async with asyncio.timeout(10):
            while not {"a", "b", "bee"} <= (await service.held_tokens()).keys():
                await asyncio.sleep(0.05)
        service.edit([emulated("a", replicas=2), emulated("c")])
        await service.until_told("model b is removed")
        async with asyncio.timeout(20):
            while "b" in await service.listed():
                await asyncio.sleep(0.05)
        assert (await ask(http, "b")).status == (await ask(http, "bee")).status == 404
        assert not all(each.done() for each in asked)
        assert (await ask(http, "c")).is_whole
        replies = await asyncio.gather(*asked)
        assert [(each.status, each.is_whole) for each in replies] == [(200, True)] * len(asked)
        await service.until_told("Engine-b: its engines have ended")
        await service.until_told("model a: 2 of 2 engines ready")
        async with asyncio.timeout(20):  # Ray takes a moment to end a worker
            while "b" in (after := await service.pids()) or any(
                map(psutil.pid_exists, before["b"])
            ):
                await asyncio.sleep(0.2)
        assert before["a"] < after["a"]
        assert (len(after["a"]), len(after["c"])) == (2, 1)
        assert await service.listed() == ["a", "c"]
        state = await service.state()
        assert state.held.num_requests == state.outcomes["failed"] == 0
        # An edit that cannot be used changes nothing, and is told of.
        service.edit([emulated("a", replicas=2), emulated("c", aliases=["a"])])
        await service.until_told("is not used: models.1: the name 'a' is that of models.0")
        assert (await ask(http, "c")).is_whole


async def test_a_route_chooses_by_its_rules_and_does_without_a_model_whose_engine_has_died():
    models = [emulated("small"), emulated("large")]
    async with (
        Models(2, models, routes=ROUTES) as service,
        httpx.AsyncClient(base_url=service.urls[0], timeout=90) as http,
    ):
        await service.until_told("ready after")
        assert await service.listed() == ["small", "large", "auto"]
        name, why, reply = await chosen(http, "Write a python function")
        assert (name, reply.headers["x-headway-model"]) == ("large", "large")
        assert why.startswith("rule code (asks code): best of large, small; first token in ")
        way = json.loads(await service.ask(f"/headway/requests?id={reply.headers['x-request-id']}"))
        assert f"auto: {why}" in [event.get("why") for event in way["events"]]
        name, why, _ = await chosen(http, "Hello")
        assert (name, why.partition(";")[0]) == ("small", "rule 2: cheapest of small, large")
        assert (await chosen(http, "Write a python function", "small"))[:2] == ("small", "")
        [pid] = (await service.pids())["large"]
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(30):  # until then one may be sent there, and waits for the next
            while pid in (await service.pids()).get("large", ()):
                await asyncio.sleep(0.05)
        name, why, _ = await chosen(http, "Write a python function")
        assert name == "small"
        assert "; not large: no live engine; " in why
        async with asyncio.timeout(120):  # for Ray to start another
            while (await chosen(http, "Write a python function"))[0] != "large":
                await asyncio.sleep(0.2)
        counts = (await service.state()).num_chosen["auto"]
        assert counts["large"] == 2
        assert counts["small"] >= 2


@pytest.mark.engine
@pytest.mark.timeout(600)
async def test_traffic_on_one_real_model_does_not_delay_another(tmp_path, record_property):
    """Two tiny vLLM engines, a core each: one has more than it can do, the other does not wait."""
    small = {"args": {"max_model_len": 2048, "kv_cache_memory_bytes": 128 << 20}}
    models = [
        {"model": str(tiny_model(tmp_path / name, seed=seed)), "served_model_name": name}
        for seed, name in enumerate(("busy", "quiet"))
    ]
    rules = [{"when": {"asks": ["code"]}, "models": ["busy"]}, {"models": ["quiet"]}]
    route = {"models": {"busy": {}, "quiet": {}}, "rules": rules}
    async with (
        Models(2, models, engine=small, routes={"auto": route}) as service,
        httpx.AsyncClient(base_url=service.urls[0], timeout=120) as http,
    ):
        await service.until_told("ready after", timeout_s=300.0)
        texts = {}
        for name in ("busy", "quiet"):
            body = {"model": name, "prompt": "The capital", "max_tokens": 12, "temperature": 0}
            reply = await http.post("/v1/completions", json=body)
            texts[name] = reply.json()["choices"][0]["text"]
        assert texts["busy"] != texts["quiet"]  # each is its own model
        # By a route each is asked for by the wording alone.
        assert (await chosen(http, "Write a python function"))[0] == "busy"
        assert (await chosen(http, "Hello"))[0] == "quiet"
        alone = [(await ask(http, "quiet")).ttft_s for _ in range(12)]
        crowd = [asyncio.create_task(ask_on(http, "busy", 1800)) for _ in range(60)]
        async with asyncio.timeout(60):
            while "busy" not in await service.held_tokens():
                await asyncio.sleep(0.05)
        beside, held = [], 0
        for _ in range(12):
            reply = await ask(http, "quiet")
            assert reply.is_whole
            beside.append(reply.ttft_s)
            waiting = await service.held_tokens()
            held += "busy" in waiting
            assert "quiet" not in waiting
        for each in crowd:
            each.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)
        assert held >= 10  # looked at after each reply: there was a queue all the time
        record_property(
            "figures",
            f"TTFT p50 of the quiet model: {np.median(alone) * 1000:.0f} ms alone, "
            f"{np.median(beside) * 1000:.0f} ms beside a model with a queue",
        )
        assert np.median(beside) < np.median(alone) + 0.25
