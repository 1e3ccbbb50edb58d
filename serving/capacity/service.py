"""How is `headway serve` started, asked and ended by whoever measures it?"""

import asyncio
import copy
import http.client
import json
import random
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Self

import msgspec
import yaml

from router import EngineSnapshot
from router.simulation.variant import split
from serving.capacity.launch import Launch, MeasureError
from serving.gateway.observe.state import ServiceState

_STATE_PATH = "/headway/state"
_READY_POLL_S = 0.25
_IDLE_POLL_S = 0.1
# Above what Ray gives its workers, below what Linux gives connections.
_PORTS = range(20_000, 32_000)


class SystemUnderTest:
    """An endpoint to measure; it runs within `async with`."""

    start_timeout_s: ClassVar[float] = 120.0

    def __init__(self, name: str, num_engines: int) -> None:
        self.name = name
        self.num_engines = num_engines
        self.urls: list[str] = []
        self.launches: list[Launch] = []
        self.killed: list[str] = []  # titles of processes that had to be killed
        self._folder = tempfile.TemporaryDirectory(prefix="headway-measured-")

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
        """End every process and remove every file of this system."""
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
                log = "\n".join(launch.log_tail() for launch in self.launches)
                reason = "ended" if ended else f"is not ready after {self.start_timeout_s:g} s"
                raise MeasureError(f"{self.name} {reason}: {_last_line(log)}", log)
            await asyncio.sleep(_READY_POLL_S)


class Service(SystemUnderTest):
    """`headway serve` by a configuration, started as a user starts it."""

    # A machine's first start downloads the model and converts it.
    start_timeout_s = 900.0

    def __init__(
        self,
        num_engines: int,
        args: Mapping[str, Any],
        *,
        front: str = "own",
        name: str = "headway serve",
    ) -> None:
        """`args` are Headway's keys of the config file; ports and replicas are added."""
        super().__init__(name, num_engines)
        self._args = args
        self._front = front

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
                        **copy.deepcopy(dict(self._args)),  # for subclasses to change
                        "replicas": self.num_engines,
                        "gateway": {"front": self._front, "port": gateway_port},
                    },
                }
            ],
        }

    async def state(self) -> ServiceState:
        """Return the gateways' present state. Raises `MeasureError` if none answers."""
        return msgspec.json.decode(await self.ask(_STATE_PATH), type=ServiceState)

    def find_state(self) -> ServiceState | None:
        """Return the gateways' present state, None if none answers in time."""
        found = get_json(self.urls[0] + _STATE_PATH)
        return None if found is None else msgspec.convert(found, ServiceState)

    async def switch(self, policy: str) -> None:
        """Make all gateways use `policy`; `headway:hold,order` is headway without these two."""
        name, parts = split(policy)
        await self.ask("/headway/policy", {"policy": name, "ablate": parts})

    async def wait_until_idle(self, timeout_s: float = 120.0) -> None:
        """Return when neither the gateway nor an engine has a request left."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            num_open = (await self.state()).num_open_requests
            if not num_open and not await asyncio.to_thread(self.num_streams_in_engines):
                return
            if time.monotonic() > deadline_s:
                raise MeasureError(f"still {num_open} requests open after {timeout_s:g} s")
            await asyncio.sleep(_IDLE_POLL_S)

    def num_streams_in_engines(self) -> int:
        """Return the number of requests in the engines, by their last snapshots."""
        return sum(
            max(snapshot.num_running_reqs, snapshot.num_inflight_reqs)
            for snapshot in self._snapshots()
        )

    async def ask(self, path: str, body: Mapping[str, Any] | None = None) -> str:
        """Return the answer to a GET, or a POST of `body`. Raises `MeasureError` if it fails."""
        return await asyncio.to_thread(self._ask, path, body)

    def _launch(self, folder: Path) -> None:
        port, gateway_port = free_ports(2)
        self.urls = [f"http://127.0.0.1:{gateway_port if self._front == 'own' else port}"]
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(self.config(port, gateway_port)))
        command = [sys.executable, "-m", "serving.cli.main", "serve", str(path)]
        self.launches = [Launch(command, folder / "headway.log")]

    def _is_ready(self) -> bool:
        if get_json(f"{self.urls[0]}/health") is None:
            return False
        return len(self._snapshots()) == self.num_engines

    def _snapshots(self) -> list[EngineSnapshot]:
        state = self.find_state()
        replicas = state.replicas.values() if state is not None else ()
        return [replica.snapshot for replica in replicas if replica.snapshot is not None]

    def _ask(self, path: str, body: Mapping[str, Any] | None) -> str:
        data = None if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"content-type": "application/json"}
        request = urllib.request.Request(self.urls[0] + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return reply.read().decode()
        except urllib.error.HTTPError as error:
            reason = error.read().decode(errors="replace")
            raise MeasureError(f"{path}: HTTP {error.code}: {reason}") from None
        except OSError as error:
            log = self.launches[0].log_tail()
            raise MeasureError(
                f"{path} does not answer ({error}): {_last_line(log)}", log
            ) from None


def free_ports(count: int) -> list[int]:
    """Return ports on which nothing listens now.

    They are none of those that a system gives to whoever asks for any port, or a connection could
    have taken one by the time that it is listened on. Raises `MeasureError` if there are no more.
    """
    ports = []
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise MeasureError(f"no {count} ports of {_PORTS.start} to {_PORTS.stop - 1} are free")


def get_json(url: str) -> Any:
    """Return the JSON at `url`, None unless it answers 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return json.load(reply)
    except (OSError, http.client.HTTPException, ValueError):
        return None


def _last_line(log: str) -> str:
    """Return the log's last line, in which `headway serve` gives the reason of its end."""
    lines = log.strip().splitlines() or ["it has said nothing"]
    return lines[-1].removeprefix("headway: ")
