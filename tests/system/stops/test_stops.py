"""Whoever is told to stop or killed: fifteen seconds later nothing of the service is left.

A signal that asks to stop, wherever it arrives, is a request to the launcher: streams end whole or
with an error event. After a kill they do so as well, unless the gateway itself was killed.
"""

import asyncio
import contextlib
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from benchmarks.systems.null_engine import MODEL
from serving.capacity.launch import Launch
from serving.capacity.service import Service
from serving.cluster.processes import RUN_VARIABLE
from tests.support.running_gateway import CHAT
from tests.support.tiny_model import tiny_model

pytestmark = pytest.mark.timeout(300)

GONE_S = 15.0
DRAIN_S = 2.0
TARGETS = ("launcher", "group", "descendants", "gcs_server", "raylet")
SIGNALS = ("SIGINT", "SIGTERM", "SIGKILL")


class Stopped(Service):
    """A service of its own, whose streams may take two seconds when it drains."""

    def __init__(self, args: dict[str, Any], num_engines: int, front: str = "own") -> None:
        super().__init__(num_engines, {"device": "cpu", **args}, front=front)

    def config(self, port: int, gateway_port: int) -> dict[str, Any]:
        config = super().config(port, gateway_port)
        engine = config["applications"][0]["args"].setdefault("engine", {})
        engine["drain_timeout_s"] = DRAIN_S
        return config

    @property
    def launch(self) -> Launch:
        return self.launches[0]

    def send(self, target: str, signum: int) -> None:
        """Send the signal to the launcher, its group, all below it, or one of Ray's processes."""
        launcher = psutil.Process(self.launch.pid)
        below = launcher.children(recursive=True)
        if target == "group":
            os.killpg(launcher.pid, signum)
            return
        targets = {"launcher": [launcher], "descendants": below}
        for process in targets.get(target, [p for p in below if p.name() == target]):
            with contextlib.suppress(psutil.NoSuchProcess):  # gone with one that was killed before
                process.send_signal(signum)

    def folder(self) -> Path:
        """The folder of the run, as its processes know it."""
        for process in psutil.Process(self.launch.pid).children():
            if folder := process.environ().get(RUN_VARIABLE):
                return Path(folder)
        raise AssertionError("no process of Ray")


def null_service(front: str = "own") -> Stopped:
    engine = {
        "factory": "tests.system.stops.engine_with_core:EngineWithCore",
        "args": {"step_ms": 20},
    }
    return Stopped({"served_model_name": MODEL, "engine": engine}, 2, front)


class Stream:
    """One streamed reply, read to whatever end it takes."""

    def __init__(self, url: str, num_tokens: int) -> None:
        self.events: list[str] = []
        self.error: httpx.HTTPError | None = None
        self.task = asyncio.create_task(self._read(url, num_tokens))

    async def _read(self, url: str, num_tokens: int) -> None:
        body = {
            "messages": [{"role": "user", "content": "hi"}],
            "stream": True,
            "max_tokens": num_tokens,
            "ignore_eos": True,
        }
        try:
            async with (
                httpx.AsyncClient(timeout=60) as http,
                http.stream("POST", url + CHAT, json=body) as reply,
            ):
                async for line in reply.aiter_lines():
                    if line:
                        self.events.append(line)
        except httpx.HTTPError as error:
            self.error = error

    @property
    def end(self) -> str:
        if self.error is not None:
            return "cut"
        if self.events[-1] == "data: [DONE]":
            return "whole"
        return "error event" if self.events[-1].startswith('data: {"error":') else "unended"


async def stop(service: Stopped, target: str, signum: int, *num_tokens: int) -> list[str]:
    """Stop the service under streams. Return how they ended, after all else is as it should be."""
    async with asyncio.timeout(30):
        while "Ctrl-C drains" not in service.launch.log_tail():
            await asyncio.sleep(0.05)
        streams = [Stream(service.urls[0], number) for number in num_tokens]
        while not all(len(stream.events) > 3 for stream in streams):
            assert not any(stream.task.done() for stream in streams), [s.events for s in streams]
            await asyncio.sleep(0.05)
    service.launch.refresh()
    processes, folder = service.launch.living(), service.folder()
    assert len(processes) > 10
    assert has_oom_order(processes)
    sent_s = time.monotonic()
    service.send(target, signum)
    while service.launch.returncode is None or service.launch.living() or folder.exists():
        assert time.monotonic() - sent_s < GONE_S, (service.launch.living(), folder.exists())
        await asyncio.sleep(0.1)
        service.launch.refresh()
    port = int(service.urls[0].rsplit(":", 1)[1])
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    await asyncio.gather(*(stream.task for stream in streams))
    return [stream.end for stream in streams]


def has_oom_order(processes: list[psutil.Process]) -> bool:
    """Whether, when memory runs out, engines and what they started go first, and nothing else."""
    others = Path("/proc/self/oom_score_adj").read_text().strip()
    for process in processes:
        title = " ".join(process.cmdline())
        is_engine = any(part in title for part in ("EngineCore", ":Engine", "multiprocessing"))
        score = Path(f"/proc/{process.pid}/oom_score_adj").read_text().strip()
        if score != ("1000" if is_engine else others):
            print(f"{title}: {score}")
            return False
    titles = [" ".join(process.cmdline()) for process in processes]
    print("\n".join(titles))
    return any("EngineCore" in title for title in titles)


def expected_code(target: str, signame: str) -> int:
    """What the launcher ends with: well after a drain, with 1 where Ray was taken from it."""
    if signame != "SIGKILL":
        return 0
    return -signal.SIGKILL if target in ("launcher", "group") else 1


@pytest.mark.parametrize("signame", SIGNALS)
@pytest.mark.parametrize("target", TARGETS)
async def test_nothing_stays_behind(target: str, signame: str) -> None:
    async with null_service() as service:
        # One stream ends within the drain, one would go on for half an hour.
        ends = await stop(service, target, getattr(signal, signame), 40, 100_000)
        code = service.launch.returncode
        assert code == expected_code(target, signame)
        assert (code == 1) == ("headway: Ray has ended: its " in service.launch.log_tail())
    if signame != "SIGKILL":
        assert ends == ["whole", "error event"]
    elif target != "descendants":  # of which the gateway is one
        assert ends == ["error event", "error event"]


@pytest.mark.parametrize(
    ("target", "signum", "ends"),
    [
        ("group", signal.SIGTERM, ["whole", "error event"]),
        ("gcs_server", signal.SIGKILL, ["error event", "error event"]),
    ],
)
async def test_nothing_stays_behind_haproxy(target: str, signum: int, ends: list[str]) -> None:
    async with null_service("haproxy") as service:
        assert await stop(service, target, signum, 40, 100_000) == ends


@pytest.mark.engine
@pytest.mark.parametrize(("target", "signame"), [("group", "SIGTERM"), ("gcs_server", "SIGKILL")])
async def test_no_engine_core_of_vllm_stays_behind(
    target: str, signame: str, tmp_path: Path
) -> None:
    model = str(tiny_model(tmp_path / "tiny"))
    args = {"model": model, "engine": {"args": {"kv_cache_memory_bytes": 2**26}}}
    async with Stopped(args, 1) as service:
        ends = await stop(service, target, getattr(signal, signame), 2000, 2000)
        assert service.launch.returncode == expected_code(target, signame)
    assert {"whole", "error event"} >= set(ends)
