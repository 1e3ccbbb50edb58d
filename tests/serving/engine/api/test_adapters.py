"""LoRA adapters beside their base on two real engines, of which each has room for one."""

import asyncio
import shutil
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from router.types import AdapterState
from serving.config import parse
from serving.engine.vllm.engine import VllmEngine
from serving.gateway.app import Gateway
from serving.gateway.http.listener import Listener
from serving.planning.hardware import detect_hardware
from serving.planning.plan import make_plan
from serving.stream.server import StreamServer
from tests.serving.engine.api.tiny_adapter import RANK, tiny_adapter
from tests.serving.engine.conftest import ARGS
from tests.support.running_gateway import free_port
from tests.support.tiny_model import tiny_model

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="module"),
]

ENGINES = ("r0", "r1")
BASE, RED, BLUE, GREEN = "tiny", "red", "blue", "green"
PROMPT = "Once upon a time there was"


class Pair:
    """A gateway, and two engines whose cores are processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.red = tiny_adapter(folder / RED, seed=1)
        args = {
            **ARGS,
            "enable_lora": True,
            "max_loras": 1,
            "max_lora_rank": 2 * RANK,
            "lora_modules": [{"name": RED, "path": str(self.red)}],
        }
        self.settings = {
            "model": str(tiny_model(folder / "model")),
            "served_model_name": BASE,
            "device": "cpu",
            "replicas": 1,
            "gateway": {"port": free_port()},
            "engine": {"args": args},
            # Who is slow or silent because this machine is busy is to be sent its requests still.
            "router": {
                "stale_s": 60,
                "hang_s": 60,
                "breaker": {"slow_floor_s": 60, "slow_start_s": 0},
            },
        }
        self.engines: list[VllmEngine] = []
        self.servers: list[StreamServer] = []

    async def start(self) -> None:
        config = parse(self.settings)
        members = {}
        for name in ENGINES:  # one after the other: each keeps its process's cores to itself
            engine = await VllmEngine.start(config, make_plan(config, detect_hardware()), 0)
            self.engines.append(engine)
            self.servers.append(server := StreamServer(engine, config.gateway.stream_window_bytes))
            host, port = await server.listen("127.0.0.1")
            members[name] = {"host": host, "port": port, "secret": server.secret}
        self.gateway = Gateway(config, "gateway")
        self.listener = Listener(self.gateway.app, config.gateway)
        await self.listener.start()
        url = f"http://127.0.0.1:{config.gateway.port}"
        self.http = httpx.AsyncClient(base_url=url, timeout=60)
        self.gateway.driver.engines.set_members(members)
        await self.until(lambda: len(self.gateway.driver.engines.infos) == len(ENGINES))
        await self.until(lambda: all(self.held(each).resident for each in ENGINES))

    async def close(self) -> None:
        if hasattr(self, "gateway"):
            await self.http.aclose()
            self.gateway.close()
            await self.listener.stop()
        for server in self.servers:
            server.close()
        for engine in self.engines:
            await engine.shutdown()

    async def until(self, condition: Any, timeout_s: float = 20.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.01)

    def held(self, engine: str) -> AdapterState:
        """Return what the state says that an engine has of adapters."""
        state = self.gateway.state().replicas[engine].adapters
        assert state is not None
        return state

    def owner(self, adapter: str) -> str:
        """Return the one engine where it is resident."""
        [engine] = [each for each in ENGINES if adapter in self.held(each).resident]
        return engine

    async def ask(self, model: str, **fields: Any) -> httpx.Response:
        body = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, **fields}
        return await self.http.post("/v1/completions", json=body)

    async def text(self, model: str, **fields: Any) -> str:
        reply = await self.ask(model, **fields)
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"][0]["text"]

    async def engines_of(self, model: str, number: int = 6) -> Counter[str]:
        """Return which engines answer, one request after the other."""
        answered_by: Counter[str] = Counter()
        for _ in range(number):
            await self.until(self.is_idle)
            answered_by[(await self.ask(model)).headers["x-headway-engine"]] += 1
        return answered_by

    def is_idle(self) -> bool:
        states = self.gateway.state().replicas.values()
        return not any(each.snapshot is None or each.snapshot.num_inflight_reqs for each in states)

    async def load(self, name: str, path: Path) -> httpx.Response:
        body = {"lora_name": name, "lora_path": str(path)}
        return await self.http.post("/v1/load_lora_adapter", json=body)

    async def names(self) -> list[str]:
        return [card["id"] for card in (await self.http.get("/v1/models")).json()["data"]]


def other_than(engine: str) -> str:
    return ENGINES[1 - ENGINES.index(engine)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tmp_path_factory) -> AsyncIterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("adapters"))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
            await pair.start()
        yield pair
    finally:
        await pair.close()


async def test_an_adapter_that_is_at_hand_is_preferred(pair: Pair) -> None:
    """One is there from the start, one is loaded while serving: by one engine, though both can."""
    assert await pair.names() == [BASE, RED]
    assert (await pair.ask(BLUE)).status_code == 404
    assert (await pair.load(BLUE, tiny_adapter(pair.folder / BLUE, seed=2))).status_code == 200
    assert await pair.names() == [BASE, RED, BLUE]
    home = pair.owner(BLUE)
    other = pair.owner(RED)
    assert home != other
    assert pair.held(home).load_s[BLUE] > 0.0
    assert BLUE not in pair.held(other).load_s  # it has only looked at the files
    assert await pair.engines_of(BLUE) == {home: 6}
    assert await pair.engines_of(RED) == {other: 6}
    texts = [await pair.text(name) for name in (BASE, RED, BLUE)]
    assert len(set(texts)) == 3
    assert pair.held(other).load_s.keys() == {RED}  # nothing was loaded since


async def test_one_beyond_what_an_engine_has_room_for_waits_or_takes_a_place(pair: Pair) -> None:
    """Three adapters at once on two engines with room for one each: all are answered, and right."""
    reply = await pair.load(GREEN, tiny_adapter(pair.folder / GREEN, seed=3))
    assert reply.status_code == 200
    names = (BASE, RED, BLUE, GREEN)
    alone = {name: await pair.text(name) for name in names}
    assert len(set(alone.values())) == 4
    asked = [name for _ in range(5) for name in names]
    texts = await asyncio.gather(*(pair.text(name) for name in asked))
    assert dict(zip(asked, texts, strict=True)) == alone
    assert all(text == alone[name] for name, text in zip(asked, texts, strict=True))
    for engine in ENGINES:
        await pair.until(lambda engine=engine: not pair.held(engine).num_requests)
        assert len(pair.held(engine).resident) == 1


async def test_one_whose_files_are_gone_ends_no_engine(pair: Pair) -> None:
    """It would have to be loaded in the middle of a step."""
    for engine in ENGINES:  # green gives way wherever it is
        pair.gateway.driver.engines.drain(other_than(engine), drains=True)
        await pair.text(RED)
        pair.gateway.driver.engines.drain(other_than(engine), drains=False)
        await pair.until(lambda engine=engine: pair.held(engine).resident == [RED])
    home = pair.folder / GREEN
    shutil.move(home, pair.folder / "elsewhere")
    reply = await pair.ask(GREEN)
    assert reply.status_code == 400
    assert "green" in reply.text
    assert (await pair.load("again", home)).status_code == 404
    assert await pair.text(BASE)


async def test_one_that_was_loaded_in_place_is_not_read_from_its_files_again(pair: Pair) -> None:
    """In each step, as vLLM keeps it: without its files that would end an engine."""
    alone = await pair.text(BLUE)
    moved = tiny_adapter(pair.folder / "moved", seed=4)
    body = {"lora_name": BLUE, "lora_path": str(moved), "load_inplace": True}
    assert (await pair.http.post("/v1/load_lora_adapter", json=body)).status_code == 200
    text = await pair.text(BLUE)
    assert text != alone
    shutil.move(moved, pair.folder / "away")
    for _ in range(4):
        assert await pair.text(BLUE) == text
    assert len(pair.gateway.driver.engines.infos) == len(ENGINES)


async def test_one_that_is_unloaded_is_unknown(pair: Pair) -> None:
    reply = await pair.http.post("/v1/unload_lora_adapter", json={"lora_name": BLUE})
    assert reply.status_code == 200
    assert BLUE not in await pair.names()
    assert (await pair.ask(BLUE)).status_code == 404
    assert await pair.text(RED)
