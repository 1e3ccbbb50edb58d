"""Several Ray nodes on one machine, each at a loopback address of its own, and a launch on them."""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import psutil

from serving.capacity.service import free_ports
from tests.docs.documents import ROOT

_START_S = 60.0
_BIN = Path(sys.executable).parent


class Node:
    """The processes of one Ray node, whose parent ends with them."""

    def __init__(self, process: subprocess.Popen, address: str) -> None:
        self.address = address
        self._process = psutil.Process(process.pid)
        self._popen = process

    def descendants(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return self._process.children(recursive=True)
        return []

    def raylet(self) -> psutil.Process:
        (found,) = [each for each in self.descendants() if each.name() == "raylet"]
        return found

    def end(self) -> None:
        """Kill all that there is of it."""
        processes = [*self.descendants(), self._process]
        for each in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        self._popen.wait(10)
        psutil.wait_procs(processes, timeout=10)


class RayCluster:
    """A Ray that is somebody else's: it has a token, and no application yet."""

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="nodes-", dir="/tmp")  # Ray's sockets need it short
        self._port = free_ports(1)[0]
        self.nodes: list[Node] = []
        self.address = f"127.0.0.2:{self._port}"
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # Linux is taken for one on loopback
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_memory_monitor_refresh_ms": "0",
            "PYTHONPATH": str(ROOT),
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for node in reversed(self.nodes):
            node.end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, num_cpus: int) -> Node:
        """Start one more node, the first one as the head; return once it has joined."""
        number = len(self.nodes) + 1
        address = f"127.0.0.{number + 1}"  # Ray replaces 127.0.0.1
        role = (
            ["--head", f"--port={self._port}", "--include-dashboard=false"]
            if number == 1
            else [f"--address={self.address}"]
        )
        log = Path(self._folder) / f"node-{number}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [
                    *(str(_BIN / "ray"), "start", "--block", *role, f"--num-cpus={num_cpus}"),
                    *("--num-gpus=0", f"--node-ip-address={address}", f"--temp-dir={self._folder}"),
                    *("--object-store-memory=100000000", "--min-worker-port=0"),
                    *("--max-worker-port=0", "--dashboard-agent-listen-port=0"),
                    *("--dashboard-agent-grpc-port=0", "--include-log-monitor=false"),
                ],
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.nodes.append(node := Node(process, address))
        until(
            lambda: "Ray runtime started" in log.read_text() or process.poll() is not None, _START_S
        )
        assert process.poll() is None, log.read_text()
        return node

    @contextlib.contextmanager
    def serving(self, config: Path) -> Iterator["Launch"]:
        """Serve a config file on it by `headway serve --address`, as a user does."""
        log = Path(self._folder) / "headway.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [str(_BIN / "headway"), "serve", str(config), "--address", self.address],
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        try:
            yield Launch(process, log)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(10)


class Launch:
    """A running `headway serve`."""

    def __init__(self, process: subprocess.Popen, log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def said(self) -> str:
        return self._log.read_text()

    def wait_until(self, text: str, timeout_s: float) -> None:
        """Return once it has said this; fail if it ends before."""
        until(
            lambda: text in self.said or self.process.poll() is not None,
            timeout_s,
            lambda: self.said,
        )
        assert text in self.said, self.said


def until(
    condition: Callable[[], Any], timeout_s: float, tell: Callable[[], str] = lambda: ""
) -> Any:
    """Return the first truthy result; fail after `timeout_s`, with what `tell` says."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, f"not so after {timeout_s} s: {tell()}"
        time.sleep(0.1)
    return found
