"""A running `headway serve` with real engines."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import msgspec

from router.types import EngineSnapshot
from serving.gateway.observe.state import GatewayState
from tests.docs.documents import ROOT
from tests.support.running_gateway import free_port

START_TIMEOUT_S = 240
DOCUMENTED_PORT = 8000


def start_headway(log: Path, *options: str) -> "Server":
    """Start one with these options on a free port. Its output goes to `log`."""
    port = free_port()
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                str(Path(sys.executable).parent / "headway"),
                *("serve", "--device", "cpu", "--port", str(port), *options),
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    return Server(process, port)


def make_serve(log: Path) -> "Server":
    """Start `make serve`, on another port only if that of the documents is taken."""
    port = DOCUMENTED_PORT if is_free(DOCUMENTED_PORT) else free_port()
    more = [] if port == DOCUMENTED_PORT else [f"ARGS=--port {port}"]
    with log.open("w") as output:
        process = subprocess.Popen(
            ["make", "serve", *more],
            cwd=ROOT,
            # On a GPU node, too, these tests are about the CPU build.
            env=os.environ | {"HEADWAY_DEVICE": "cpu"},
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    return Server(process, port)


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


class Server:
    """A running `headway serve`."""

    def __init__(self, process: subprocess.Popen, port: int) -> None:
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def state(self) -> GatewayState:
        reply = self.http.get("/headway/state")
        return msgspec.json.decode(reply.content, type=GatewayState)

    def snapshots(self) -> list[EngineSnapshot]:
        return [replica.snapshot for replica in self.state().replicas.values()]

    def total(self, field: str) -> float:
        return sum(getattr(snapshot, field) for snapshot in self.snapshots())

    def until(self, condition, timeout_s: float):
        """Return the first truthy `condition()`; fail after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            assert time.monotonic() < deadline, f"not so after {timeout_s} s"
            time.sleep(0.02)
        return value

    def settled_steps(self) -> float:
        """Return the engines' steps once none was added for 0.3 s.

        An engine without requests may still have a step in flight: that of one who left.
        """
        steps, since = self.total("num_steps_total"), time.monotonic()
        while time.monotonic() - since < 0.3:
            time.sleep(0.05)
            if (now := self.total("num_steps_total")) != steps:
                steps, since = now, time.monotonic()
        return steps

    def is_ready(self) -> bool:
        """Whether both engines take requests."""
        try:
            return self.http.get("/health").json()["num_engines"] == 2
        except (httpx.HTTPError, KeyError):
            return False

    def idle(self) -> bool:
        state = self.state()
        return not state.num_open_requests and not any(
            replica.snapshot.num_inflight_reqs or replica.snapshot.num_running_reqs
            for replica in state.replicas.values()
        )
