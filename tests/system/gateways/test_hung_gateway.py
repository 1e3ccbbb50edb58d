"""A gateway that hangs is replaced within ten seconds; it gets connections until then."""

import asyncio
import os
import signal
import textwrap
import time
from pathlib import Path

import httpx
import psutil
import pytest

from benchmarks.systems.system import NullHeadway
from serving.cluster.processes import has_ended

pytestmark = pytest.mark.timeout(300)

ANSWERED_S = 10.0
NUM_CONNECTIONS = 40  # of which a gateway of two has none once in 10^12 times

# In every process: block the loop on which a gateway works once a file with its id appears.
BLOCK = """
    import os, threading, time
    from pathlib import Path

    def watch():
        while not Path(os.environ["BLOCKED"], str(os.getpid())).exists():
            time.sleep(0.2)
        for thread in threading.enumerate():
            if thread.name == "gateway":
                thread._target.__self__.call_soon_threadsafe(time.sleep, 1000)

    if "BLOCKED" in os.environ:
        threading.Thread(target=watch, daemon=True).start()
"""


class TwoGateways(NullHeadway):
    """Two gateways that share a port, and an engine."""

    def __init__(self) -> None:
        super().__init__("own", num_engines=1, num_gateways=2)

    def gateways(self) -> list[psutil.Process]:
        self.launches[0].refresh()
        return [
            process
            for process in self.launches[0].living()
            if any("ServeReplica:headway:Gateway" in part for part in process.cmdline())
        ]


async def num_known(url: str) -> int:
    """How many gateways listen, as one of them has heard; 0 if one of them does not answer."""
    async with httpx.AsyncClient(timeout=5) as http:
        state = (await http.get(f"{url}/headway/state")).json()
    return 0 if "missing" in state else len(state["gateways"])


async def is_answered(url: str) -> bool:
    """Whether a new connection is answered within two seconds."""
    try:
        # Certificates of which there are none take a busy machine seconds to read, for forty.
        async with httpx.AsyncClient(timeout=2, verify=False) as http:
            return (await http.get(f"{url}/health/live")).status_code == 200
    except httpx.HTTPError:
        return False


async def num_answered(url: str) -> int:
    return sum(await asyncio.gather(*(is_answered(url) for _ in range(NUM_CONNECTIONS))))


async def test_a_hung_gateway_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(BLOCK))
    monkeypatch.setenv(
        "PYTHONPATH",
        os.pathsep.join([str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]),
    )
    monkeypatch.setenv("BLOCKED", str(tmp_path))
    async with TwoGateways() as service:
        for way in ("blocked", "stopped"):
            async with asyncio.timeout(60):
                while (
                    await num_known(service.urls[0]) < 2
                    or await num_answered(service.urls[0]) < NUM_CONNECTIONS
                ):
                    await asyncio.sleep(0.2)
            victim = service.gateways()[0]
            began_s = time.monotonic()
            if way == "blocked":
                (tmp_path / str(victim.pid)).touch()
            else:
                victim.send_signal(signal.SIGSTOP)
            await asyncio.sleep(1.0)
            assert 0 < await num_answered(service.urls[0]) < NUM_CONNECTIONS
            while not has_ended(victim):
                await asyncio.sleep(0.1)
                assert time.monotonic() - began_s < ANSWERED_S, way
            assert await num_answered(service.urls[0]) == NUM_CONNECTIONS
    assert service.killed == []
