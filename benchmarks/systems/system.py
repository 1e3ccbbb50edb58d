"""What is measured: the stand-in engines behind Headway, or by themselves (the floor)."""

import asyncio
import json
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml

from benchmarks.systems.null_engine import MODEL
from benchmarks.systems.processes import Launch

_ROOT = Path(__file__).parents[2]


class BenchmarkError(Exception):
    """What is measured did not start or does not answer: there is nothing to measure."""


class SystemUnderTest:
    """An endpoint under test, up between `async with` and its end."""

    start_timeout_s: ClassVar[float] = 120.0

    def __init__(self, name: str, num_engines: int) -> None:
        self.name = name
        self.num_engines = num_engines
        self.urls: list[str] = []
        self.launches: list[Launch] = []
        self.killed: list[str] = []  # titles of processes that did not end by themselves
        self._folder = tempfile.TemporaryDirectory(prefix="headway-bench-")

    async def __aenter__(self) -> Self:
        try:
            self._launch(Path(self._folder.name))
            await self._wait_until_ready()
        except BaseException:
            self.end()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.end()

    def end(self) -> None:
        """End every process and remove every file of this subject."""
        for launch in self.launches:
            for title in launch.end():
                self.killed.append(title)
                print(f"killed, for it did not end by itself: {title}", file=sys.stderr)
        self._folder.cleanup()

    def _launch(self, folder: Path) -> None:
        raise NotImplementedError

    def _is_ready(self) -> bool:
        raise NotImplementedError

    async def _wait_until_ready(self) -> None:
        deadline_s = time.monotonic() + self.start_timeout_s
        while not await asyncio.to_thread(self._is_ready):
            ended = any(launch.returncode is not None for launch in self.launches)
            if ended or time.monotonic() > deadline_s:
                logs = "\n".join(launch.log_tail() for launch in self.launches)
                reason = "ended" if ended else f"is not ready after {self.start_timeout_s:g} s"
                raise BenchmarkError(f"{self.name} {reason}:\n{logs}")
            await asyncio.sleep(0.25)


class Floor(SystemUnderTest):
    """Client straight to the engines, each served by uvicorn alone: no path can be cheaper."""

    def __init__(self, num_engines: int) -> None:
        super().__init__("floor", num_engines)

    def _launch(self, folder: Path) -> None:
        for number, port in enumerate(free_ports(self.num_engines)):
            self.urls.append(f"http://127.0.0.1:{port}")
            command = [sys.executable, "-m", "benchmarks.systems.null_engine", "--port", str(port)]
            self.launches.append(Launch(command, folder / f"engine-{number}.log", _ROOT))

    def _is_ready(self) -> bool:
        return all(get_json(f"{url}/health") is not None for url in self.urls)


class Headway(SystemUnderTest):
    """`headway serve` with stand-in engines, started as a user starts it."""

    def __init__(self, front: str, num_engines: int) -> None:
        super().__init__(front, num_engines)

    def config(self, port: int, gateway_port: int) -> dict[str, Any]:
        """Return the content of the config file."""
        return {
            "http_options": {"host": "127.0.0.1", "port": port},
            "applications": [
                {
                    "name": "headway",
                    "route_prefix": "/",
                    "import_path": "serving.cluster.application:build",
                    "args": {
                        "served_model_name": MODEL,
                        "device": "cpu",
                        "replicas": self.num_engines,
                        "engine": {"factory": "benchmarks.systems.null_engine:NullEngine"},
                        "gateway": {"front": self.name, "port": gateway_port},
                    },
                }
            ],
        }

    def _launch(self, folder: Path) -> None:
        port, gateway_port = free_ports(2)
        self.urls = [f"http://127.0.0.1:{gateway_port if self.name == 'own' else port}"]
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(self.config(port, gateway_port)))
        command = [sys.executable, "-m", "serving.cli.main", "serve", str(path)]
        self.launches = [Launch(command, folder / "headway.log", _ROOT)]

    def _is_ready(self) -> bool:
        if get_json(f"{self.urls[0]}/health") is None:
            return False
        return len(self._snapshots()) == self.num_engines

    def num_streams_in_engines(self) -> int:
        """Return the requests that the engines still have, by their last snapshots."""
        return sum(
            max(snapshot["num_running_reqs"], snapshot["num_inflight_reqs"])
            for snapshot in self._snapshots()
        )

    def _snapshots(self) -> list[dict[str, Any]]:
        state = get_json(f"{self.urls[0]}/headway/state")
        if state is None:
            return []
        return [
            replica["snapshot"]
            for replica in state["replicas"].values()
            if replica["snapshot"] is not None
        ]


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def get_json(url: str) -> Any:
    """Return the JSON at `url`, `None` unless it answers 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return json.load(reply)
    except (OSError, urllib.error.URLError, ValueError):
        return None
