"""A service on a Ray of several nodes: one is killed under load, another joins."""

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest
import yaml

from serving.capacity.service import free_ports
from serving.gateway.observe.state import ServiceState
from tests.support.running_gateway import CHAT
from tests.system.nodes.ray_cluster import Node, RayCluster

pytestmark = pytest.mark.timeout(300)

MODEL = "emulated"
# At some 50 ms per step: long enough to kill a node in the middle of all, on a busy machine, too.
PROFILE, NUM_STREAMS, NUM_TOKENS = "smollm2-cpu", 16, 200
START_S = 150.0  # of engines, on a busy machine; 12 on two idle cores


def write_config(folder: Path, port: int) -> Path:
    """A service of two engines. Each of the nodes below has room for one."""
    args: dict[str, Any] = {
        "served_model_name": MODEL,
        "device": "cpu",
        "replicas": 2,
        "engine": {
            "factory": "serving.engine.emulated.engine:EmulatedEngine",
            "args": {"profile": PROFILE},
            "tls": "on",  # as between machines
        },
        "gateway": {"port": port},
    }
    application = {"name": "app", "import_path": "serving.cluster.application:build", "args": args}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"applications": [application]}))
    return path


async def state_of(http: httpx.AsyncClient) -> ServiceState:
    return msgspec.json.decode((await http.get("/headway/state")).content, type=ServiceState)


class Stream:
    """One reply, read to its end."""

    def __init__(self, http: httpx.AsyncClient, number: int) -> None:
        self.text = ""
        self.num_pieces = 0
        self.is_whole = False
        self._question = {
            "model": MODEL,
            "messages": [{"role": "user", "content": f"Count from {number}."}],
            "max_tokens": NUM_TOKENS,
            "stream": True,
        }
        self.task = asyncio.create_task(self._read(http))

    async def _read(self, http: httpx.AsyncClient) -> str:
        async with http.stream("POST", CHAT, json=self._question) as reply:
            assert reply.status_code == 200, await reply.aread()
            async for line in reply.aiter_lines():
                if line == "data: [DONE]":
                    self.is_whole = True
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    self.text += event["choices"][0]["delta"].get("content") or ""
                    self.num_pieces += 1
        return self.text


async def ask_all(http: httpx.AsyncClient) -> list[str]:
    streams = [Stream(http, number) for number in range(NUM_STREAMS)]
    return list(await asyncio.gather(*(stream.task for stream in streams)))


async def until(condition: Any, timeout_s: float, tell: Any = lambda: "") -> Any:
    """Return the first truthy result; fail after `timeout_s`, with what `tell` says."""
    for _ in range(int(timeout_s / 0.2)):
        if found := await condition():
            return found
        await asyncio.sleep(0.2)
    raise AssertionError(f"not so after {timeout_s} s: {tell()}")


def listens_at(process: psutil.Process) -> set[str]:
    """Return the addresses at which a process listens."""
    return {
        each.laddr.ip
        for each in process.net_connections("tcp")
        if each.status == psutil.CONN_LISTEN
    }


def engine_of(node: Node) -> psutil.Process:
    (found,) = [each for each in node.descendants() if ":Engine" in " ".join(each.cmdline())]
    return found


async def test_a_node_is_killed_under_load_and_another_takes_its_place(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with RayCluster() as cluster:
        head = cluster.add(num_cpus=1)
        second = cluster.add(num_cpus=1)
        with cluster.serving(write_config(tmp_path, port)) as launch:
            await asyncio.to_thread(launch.wait_until, "ready after", START_S)
            assert f"1 on {head.address}, 1 on {second.address}" in launch.said
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{port}", timeout=120, limits=limits
            ) as http:

                async def num_engines() -> int:
                    return len((await state_of(http)).replicas)

                async def two() -> bool:
                    return await num_engines() == 2

                await until(two, 60)
                # Each engine listens on its own node's address, and on no other.
                assert second.address in listens_at(engine_of(second))
                assert head.address not in listens_at(engine_of(second))
                undisturbed = await ask_all(http)
                assert len(set(undisturbed)) == NUM_STREAMS

                streams = [Stream(http, number) for number in range(NUM_STREAMS)]

                async def both_work() -> bool:
                    state = await state_of(http)
                    open_ = [each.ledger.num_open for each in state.replicas.values()]
                    # With fewer tokens they would be suspects, and wait for the second engine.
                    begun = all(stream.num_pieces > 12 for stream in streams)
                    assert not any(stream.is_whole for stream in streams), open_
                    return min(open_) > 0 and begun

                await until(both_work, 60)
                second.raylet().kill()  # with it go the node's workers
                texts = await asyncio.gather(*(stream.task for stream in streams))
                assert texts == undisturbed
                assert all(stream.is_whole for stream in streams)
                outcomes = (await state_of(http)).outcomes
                assert outcomes["completed"] == 2 * NUM_STREAMS
                second.end()

                await asyncio.to_thread(launch.wait_until, f"{second.address} is lost", 90)
                third = cluster.add(num_cpus=1)
                await asyncio.to_thread(launch.wait_until, f"{third.address} has joined", 30)
                await until(two, START_S, lambda: launch.said)
                engine = engine_of(third)
                assert await ask_all(http) == undisturbed

                async def third_has_computed() -> bool:
                    state = await state_of(http)
                    done = [
                        each.snapshot.num_output_tokens_total
                        for each in state.replicas.values()
                        if each.info.pid == engine.pid and each.snapshot is not None
                    ]
                    return done != [] and done[0] > 0

                await until(third_has_computed, 10)

            launch.process.terminate()
            assert await asyncio.to_thread(launch.process.wait, 60) == 0, launch.said
            # Ray goes on, without anything of ours.
            titles = [
                " ".join(each.cmdline()) for node in (head, third) for each in node.descendants()
            ]
            assert head.raylet().is_running()
            assert [title for title in titles if "Serve" in title or "headway" in title] == []
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", port)) != 0
