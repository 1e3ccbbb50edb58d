"""An engine is judged by what computes in it, not by how soon its API layer answers."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import psutil
import pytest
import pytest_asyncio

from router.core.settings import RouterSettings
from router.resilience.breaker import BreakerState
from serving.config import parse
from serving.gateway.app import Gateway
from serving.gateway.http.listener import Listener
from serving.gateway.observe.state import GatewayState
from serving.stream.server import StreamServer
from tests.serving.engine.conftest import ARGS
from tests.support.fakes import INFO, FakeEngine
from tests.support.running_gateway import free_port
from tests.support.tiny_model import tiny_model

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="module"),
]

MODEL = "tiny"
REAL, OTHER = "real", "other"
STALE_S = RouterSettings().stale_s


class Fleet:
    """A gateway in this process that knows a real engine in another, and a made-up one."""

    def __init__(self, process: asyncio.subprocess.Process, told: dict[str, Any]) -> None:
        self.process = process
        self.core = psutil.Process(told["core"])
        self.member = told["member"]

    async def start_gateway(self, config: Any) -> None:
        self.other = FakeEngine(msgspec.structs.replace(INFO, model=MODEL))
        self.other_server = StreamServer(self.other, 2**16)
        host, port = await self.other_server.listen("127.0.0.1")
        secret = self.other_server.secret
        self.gateway = Gateway(config, "gateway")
        self.listener = Listener(self.gateway.app, config.gateway)
        await self.listener.start()
        self.gateway.driver.engines.set_members(
            {REAL: self.member, OTHER: {"host": host, "port": port, "secret": secret}}
        )
        self.http = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{config.gateway.port}", timeout=60
        )
        await self.until(lambda: len(self.gateway.driver.engines.infos) == 2)

    async def until(self, condition: Any, timeout_s: float = 10.0) -> float:
        """Return the seconds until the condition holds."""
        start_s = time.monotonic()
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.01)
        return time.monotonic() - start_s

    async def ask(self, **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 8, **fields}
        return await self.http.post("/v1/completions", json=body)

    async def ask_real(self, **fields: Any) -> asyncio.Task:
        """Start a request that only the real engine can be sent, and return when it has it."""
        self.drain_other(True)
        task = asyncio.create_task(self.ask(**fields))
        await self.until(lambda: self.state().replicas[REAL].ledger.num_open)
        self.drain_other(False)
        return task

    async def until_well(self) -> None:
        """Wait until the real engine is trusted again."""
        async with asyncio.timeout(20):
            while self.state().replicas[REAL].breaker.state is not BreakerState.CLOSED:
                assert (await self.ask()).status_code == 200
                await asyncio.sleep(0.05)
        self.gateway.driver.router._health.log.clear()

    async def close(self) -> None:
        for process in (self.process.pid, self.core.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)
        await self.http.aclose()
        self.gateway.close()
        self.other_server.close()
        await self.listener.stop()
        if self.process.returncode is None:
            self.process.stdin.close()
        await asyncio.wait_for(self.process.wait(), 20)

    def core_has_ended(self) -> bool:
        """Whether or not somebody has yet asked how."""
        try:
            return self.core.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def drain_other(self, is_draining: bool) -> None:
        """Have the router send the other engine nothing, or the usual."""
        router = self.gateway.driver.router
        replica = router._fleet.get(OTHER)
        replica.is_draining = is_draining
        router._fleet.refresh(replica)

    def state(self) -> GatewayState:
        return self.gateway.state()

    def events(self) -> list[tuple[str, str]]:
        return [(event.event, event.reason) for event in self.state().breaker_events]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory) -> AsyncIterator[Fleet]:
    model = tiny_model(tmp_path_factory.mktemp("tiny"))
    settings = {
        "model": str(model),
        "served_model_name": MODEL,
        "device": "cpu",
        "replicas": 1,
        "gateway": {"port": free_port(), "max_logprob_entries": 10**9},
        "engine": {"args": {**ARGS, "max_logprobs": 49_152}},
        "router": {"breaker": {"slow_start_s": 0.0, "cooldown_s": 0.1}},
    }
    module = "tests.serving.engine.liveness.engine_process"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, json.dumps(settings)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        limit=2**20,
    )
    assert process.stdout
    assert process.stdin
    told: dict[str, Any] = {}
    async with asyncio.timeout(120):
        while "member" not in told:
            line = await process.stdout.readline()
            assert line, "it ended"
            with contextlib.suppress(ValueError):  # vLLM prints as well
                told = json.loads(line)
    fleet = Fleet(process, told)
    await fleet.start_gateway(parse(settings))
    yield fleet
    await fleet.close()
    assert fleet.core_has_ended()


async def test_a_huge_reply_is_not_held_against_its_engine(fleet: Fleet) -> None:
    """It keeps the interpreter of the replica busy, for seconds at a stretch."""
    poison = await fleet.ask_real(prompt=list(range(100, 190)), prompt_logprobs=7000)
    beside = await fleet.ask_real(prompt="It was", max_tokens=300, ignore_eos=True)
    ages, while_mute = [], None
    while not poison.done():
        await asyncio.sleep(0.05)
        seen = fleet.state().replicas[REAL]
        ages.append(seen.age_s)
        if seen.is_mute and while_mute is None:
            num_before = fleet.other.num_started
            while_mute = await asyncio.wait_for(fleet.ask(), 2)
            assert fleet.other.num_started == num_before + 1
    assert max(ages) > STALE_S + 1.0
    assert while_mute is not None
    assert [reply.status_code for reply in (await poison, await beside)] == [200, 200]
    assert fleet.events() == []
    assert fleet.state().retries.num_made == 0
    assert fleet.process.returncode is None


async def test_a_core_that_is_stopped_is_left_as_soon_as_ever(fleet: Fleet) -> None:
    """Its replica says that it has work and makes no step: it hangs."""
    stream = await fleet.ask_real(max_tokens=900, ignore_eos=True)
    await fleet.until(lambda: fleet.state().replicas[REAL].snapshot.num_decoding_reqs)
    fleet.core.suspend()
    try:
        assert await fleet.until(lambda: ("open", "hung") in fleet.events()) < 5.5
    finally:
        fleet.core.resume()
    stream.cancel()
    await fleet.until_well()


async def test_a_replica_that_is_stopped_is_left_though_its_core_runs(fleet: Fleet) -> None:
    stream = await fleet.ask_real(prompt="It was", max_tokens=900, ignore_eos=True)
    await fleet.until(lambda: fleet.state().replicas[REAL].snapshot.num_decoding_reqs)
    os.kill(fleet.process.pid, signal.SIGSTOP)
    try:
        assert await fleet.until(lambda: ("open", "stale") in fleet.events()) < STALE_S + 1.5
    finally:
        os.kill(fleet.process.pid, signal.SIGCONT)
    stream.cancel()
    await fleet.until_well()


async def test_a_core_does_not_outlive_its_replica(fleet: Fleet) -> None:
    """However that ends. It is the last test of this file, for want of an engine after it."""
    fleet.process.kill()
    assert await fleet.until(fleet.core_has_ended) < 2.0
