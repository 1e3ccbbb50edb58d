"""`headway attach` before two plain vLLM servers, of which one is killed in the middle."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.running_gateway import free_port
from tests.support.tiny_model import tiny_model

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

NUM_STREAMS = 50
NUM_TOKENS = 120
ARGS = {
    "dtype": "float32",  # so that a prefill and a decode of the same tokens agree on the next
    "max_model_len": 1024,
    "kv_cache_memory_bytes": 64 * 2**20,
    "block_size": 32,
    "enforce_eager": True,
}


@contextlib.contextmanager
def started(command: list[str], log: Path) -> Iterator[subprocess.Popen]:
    """A process within the block, and all that it has started."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen) -> None:
    """Kill a process and what it has started: an engine core outlives its server for a while."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.wait()


def wait_until(condition, timeout_s: float, log: Path, process: subprocess.Popen) -> None:
    """Return when it holds; fail with what the process has said if it ends, or takes too long."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        is_late = time.monotonic() > end_s or process.poll() is not None
        assert not is_late, log.read_text()[-3000:]
        time.sleep(0.1)


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    return False


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Two servers and their URLs."""
    folder = tmp_path_factory.mktemp("servers")
    model = tiny_model(folder / "tiny")
    with contextlib.ExitStack() as stack:
        processes, urls = [], []
        for core in range(2):
            port = free_port()
            given = {"model": str(model), "names": ["tiny"], "port": port, "args": ARGS}
            given["core"] = core % (os.cpu_count() or 1)
            command = [sys.executable, "-m", "tests.conformance.plain_server", json.dumps(given)]
            processes.append(stack.enter_context(started(command, folder / f"{core}.log")))
            urls.append(f"http://127.0.0.1:{port}")
        for number, url in enumerate(urls):
            log = folder / f"{number}.log"
            wait_until(lambda url=url: answers(url), 180, log, processes[number])
        yield processes, urls


def body(number: int) -> dict:
    question = f"Tell me a story about number {number}, please."
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": question}],
        "stream": True,
        "temperature": 0,
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
    }


async def stream(client: httpx.AsyncClient, number: int, seen: list[int]) -> str:
    """The text of a reply, which ends as it should; its length so far is in `seen`."""
    text, ids, is_done = "", set(), False
    async with client.stream("POST", "/v1/chat/completions", json=body(number)) as reply:
        assert reply.status_code == 200, await reply.aread()
        async for line in reply.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                is_done = True
                continue
            chunk = json.loads(line[6:])
            assert "error" not in chunk, line
            ids.add(chunk["id"])
            text += chunk["choices"][0]["delta"].get("content") or ""
            seen[number] = len(text)
    assert is_done
    assert len(ids) == 1
    return text


async def all_streams(url: str, seen: list[int], meanwhile=None) -> list[str]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        tasks = [asyncio.ensure_future(stream(client, n, seen)) for n in range(NUM_STREAMS)]
        if meanwhile is not None:
            await meanwhile()
        return list(await asyncio.gather(*tasks))


def test_a_server_killed_under_50_streams_loses_none_and_changes_no_text(servers, tmp_path):
    processes, urls = servers
    port, log = free_port(), tmp_path / "attach.log"
    command = [str(Path(sys.executable).parent / "headway"), "attach", *urls, "--port", str(port)]
    with started(command, log) as attached:
        wait_until(lambda: "2 of 2 servers ready" in log.read_text(), 30, log, attached)
        url = f"http://127.0.0.1:{port}"
        undisturbed = asyncio.run(all_streams(url, [0] * NUM_STREAMS))
        assert all(undisturbed)
        seen = [0] * NUM_STREAMS

        async def kill_one() -> None:
            while sum(seen) < sum(map(len, undisturbed)) // 4:
                await asyncio.sleep(0.01)
            state = (await asyncio.to_thread(httpx.get, f"{url}/headway/state")).json()
            replicas = state["replicas"].values()
            assert all(each["ledger"]["num_open"] > 5 for each in replicas), state
            kill(processes[0])

        texts = asyncio.run(all_streams(url, seen, kill_one))
        assert sum(a != b for a, b in zip(texts, undisturbed, strict=True)) == 0
        state = httpx.get(f"{url}/headway/state").json()
        assert state["outcomes"]["completed"] == 2 * NUM_STREAMS
        assert list(state["replicas"]) == [urls[1].removeprefix("http://")]
        attached.send_signal(signal.SIGINT)
        assert attached.wait(20) == 0
        assert "draining" in log.read_text()
    assert answers(urls[1])  # it stays as it was
