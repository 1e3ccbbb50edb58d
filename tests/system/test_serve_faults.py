"""On real Ray Serve, with engines that have no model: drains, and the death of a gateway."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest

from benchmarks.systems.null_engine import MODEL
from benchmarks.systems.system import NullHeadway
from router.resilience.breaker import BreakerState
from serving.gateway.observe.state import GatewayState, ServiceState
from tests.support.running_gateway import CHAT, free_port

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).parents[2]
GATEWAY = "ServeReplica:headway:Gateway"
STEP_MS = 20
NUM_STREAMS = 16


def chat(num_tokens: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hi"}]
    return {"model": MODEL, "messages": messages, "stream": True, "max_tokens": num_tokens}


class Stream:
    """One reply on a connection of its own, read to whatever end it takes."""

    def __init__(self, url: str, num_tokens: int) -> None:
        self.num_chunks = 0
        self.is_whole = False
        self.error: Exception | None = None
        self.ended_s = 0.0
        self.task = asyncio.create_task(self._read(url, num_tokens))

    async def _read(self, url: str, num_tokens: int) -> None:
        try:
            async with (
                httpx.AsyncClient(base_url=url, timeout=60) as http,
                http.stream("POST", CHAT, json=chat(num_tokens)) as reply,
            ):
                assert reply.status_code == 200
                async for line in reply.aiter_lines():
                    self.num_chunks += '"content":" ' in line
                    self.is_whole |= line == "data: [DONE]"
        except httpx.HTTPError as error:
            self.error = error
        assert not self.is_whole or self.num_chunks == num_tokens
        self.ended_s = time.monotonic()


async def open_streams(url: str, num_tokens: int) -> list[Stream]:
    """Streams that have all begun."""
    streams = [Stream(url, num_tokens) for _ in range(NUM_STREAMS)]
    await until(lambda: all(stream.num_chunks for stream in streams), 20)
    return streams


async def until(condition: Any, timeout_s: float) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.05)


class TwoGateways(NullHeadway):
    """Two gateways that share a port, and two engines."""

    def __init__(self) -> None:
        super().__init__("own", num_engines=2)

    def config(self, port: int, gateway_port: int) -> dict[str, Any]:
        config = super().config(port, gateway_port)
        args = config["applications"][0]["args"]
        args["gateway"]["replicas"] = 2
        args["engine"]["args"] = {"step_ms": STEP_MS}
        return config

    def gateways(self) -> list[psutil.Process]:
        launch = self.launches[0]
        launch.refresh()
        return [process for process in launch.living() if GATEWAY in title(process)]

    async def states(self) -> dict[str, GatewayState]:
        """The state of every gateway that answers, by its id, as one of them has them."""
        async with httpx.AsyncClient(base_url=self.urls[0], timeout=5) as http:
            return (await read_state(http)).gateways


def title(process: psutil.Process) -> str:
    """Return the title of the process; empty if it has just ended."""
    with contextlib.suppress(psutil.Error):
        return f"{process.name()} {' '.join(process.cmdline())}"
    return ""


async def read_state(http: httpx.AsyncClient) -> ServiceState:
    reply = await http.get("/headway/state")
    return msgspec.json.decode(reply.content, type=ServiceState)


def all_know(states: dict[str, GatewayState], num_engines: int) -> bool:
    """Whether there are two gateways and both know so many engines."""
    return [len(state.replicas) for state in states.values()] == [num_engines] * 2


async def test_a_killed_gateway_takes_only_its_own_clients_with_it_and_sigterm_takes_none():
    async with TwoGateways() as service:
        async with asyncio.timeout(60):
            while len(before := await service.states()) < 2:
                await asyncio.sleep(0.5)
        streams = await open_streams(service.urls[0], 400)
        victim = service.gateways()[0]
        killed_s = time.monotonic()
        victim.kill()
        # Clients of the dead one see their connection end, at once and not as a success.
        await until(lambda: any(stream.error for stream in streams), 2)
        await asyncio.sleep(1.0)
        cut = [stream for stream in streams if stream.error]
        assert 0 < len(cut) < NUM_STREAMS
        assert all(stream.ended_s - killed_s < 2 and not stream.is_whole for stream in cut)
        # Engines have dropped its requests: what is left is what the other one has.
        # Serve may have started another already.
        (alive,) = [state for id_, state in (await service.states()).items() if id_ in before]
        left = [replica.snapshot.num_inflight_reqs for replica in alive.replicas.values()]
        assert sum(left) == alive.num_open_requests == NUM_STREAMS - len(cut)
        assert {r.breaker.state for r in alive.replicas.values()} == {BreakerState.CLOSED}
        await asyncio.gather(*(stream.task for stream in streams))
        assert all(stream.is_whole for stream in streams if stream not in cut)
        # Ray starts another one, which answers first and finds the engines a moment later.
        async with asyncio.timeout(90):
            while not all_know(after := await service.states(), 2):
                await asyncio.sleep(0.5)
        assert len(after.keys() - before.keys()) == 1

        streams = await open_streams(service.urls[0], 250)
        launch = service.launches[0]
        os.kill(launch.pid, signal.SIGTERM)
        await asyncio.gather(*(stream.task for stream in streams))
        assert [stream.error for stream in streams if not stream.is_whole] == []
        await until(lambda: launch.returncode is not None, 40)
        assert launch.returncode == 0, launch.log_tail()
    assert service.killed == []


# Deploys, and deploys anew at each line on stdin: once with one engine less, once with
# another configuration, by which Serve replaces gateway and engines.
DEPLOY = """
import os, sys
from serving.cluster.ray_session import private_environment, private_session
from serving.cluster.run.run_folder import run_folder

port = int(sys.argv[1])
with run_folder() as folder:
    os.environ.update(private_environment(folder, haproxy=False, given=os.environ))
    from ray import serve
    from serving.cluster.application import build

    def application(num_engines, **more):
        gateway = build({
            "served_model_name": "null-engine", "device": "cpu", "replicas": 2,
            "engine": {
                "factory": "benchmarks.systems.null_engine:NullEngine",
                "args": {"step_ms": 20},
            },
            "gateway": {"port": port}, **more,
        })._bound_deployment
        args, (engine,), *names = gateway.init_args
        engine = engine._bound_deployment
        return gateway.bind(
            args, (engine.options(num_replicas=num_engines).bind(*engine.init_args),), *names
        )

    with private_session(folder, 8, 0, {}, False):
        serve.start(proxy_location="Disabled")
        serve.run(application(2), name="headway")
        print("up", flush=True)
        sys.stdin.readline()
        serve.run(application(1), name="headway")
        print("smaller", flush=True)
        sys.stdin.readline()
        serve.run(application(1, router={"max_hold_s": 100.0}), name="headway")
        print("other", flush=True)
        sys.stdin.readline()
        serve.shutdown()
"""


async def test_fewer_engines_and_another_configuration_abort_nothing(tmp_path):
    script = tmp_path / "deploy.py"
    script.write_text(textwrap.dedent(DEPLOY))
    url = f"http://127.0.0.1:{(port := free_port())}"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-u", str(script), str(port)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    assert process.stdin
    assert process.stdout

    async def says(word: str) -> None:
        while line := (await process.stdout.readline()).decode():
            if line.strip() == word:
                return
        raise AssertionError(f"ended before {word!r}")

    async def state() -> ServiceState:
        async with httpx.AsyncClient(base_url=url, timeout=5) as http:
            return await read_state(http)

    try:
        async with asyncio.timeout(240):
            await says("up")
            while len((await state()).replicas) < 2:
                await asyncio.sleep(0.2)
            for step, num_tokens in (("smaller", 300), ("other", 600)):
                streams = await open_streams(url, num_tokens)
                process.stdin.write(b"go on\n")
                await says(step)
                await asyncio.gather(*(stream.task for stream in streams))
                assert [stream.error for stream in streams if not stream.is_whole] == []
                while len((await state()).replicas) != 1:
                    await asyncio.sleep(0.2)
                found = await state()
                assert found.num_open_requests == found.retries.num_made == 0
                assert found.breaker_events == []
    finally:
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), 60)
        except TimeoutError:
            os.killpg(process.pid, signal.SIGKILL)
            raise
