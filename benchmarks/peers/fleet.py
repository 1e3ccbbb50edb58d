"""Which engines stand behind the peers? Emulated or real ones, each a server of its own."""

import sys
from pathlib import Path
from typing import Literal

from benchmarks.peers.routers.peer import answers
from serving.capacity.launch import Launch
from serving.capacity.service import SystemUnderTest, free_ports
from serving.planning.bundled_model import SERVED_MODEL_NAME

# With Headway's step budget, block size and cap on a prompt's part of a step, or with vLLM's own.
EngineSettings = Literal["ours", "stock"]


class EmulatedFleet(SystemUnderTest):
    """Emulated engines of one profile, for the peers to route to."""

    def __init__(
        self, profile: str, num_engines: int, model: str, settings: EngineSettings = "ours"
    ) -> None:
        super().__init__(f"emulated engines, {settings} settings", num_engines)
        self._profile = profile
        self._model = model
        self._settings = settings

    def _launch(self, folder: Path) -> None:
        for number, port in enumerate(free_ports(self.num_engines)):
            self.urls.append(f"http://127.0.0.1:{port}")
            command = [
                *(sys.executable, "-m", "benchmarks.peers.emulated_server", "--port", str(port)),
                *("--profile", self._profile, "--model", self._model),
            ]
            if self._settings == "stock":
                command += ["--itl-target-s", "0"]
            self.launches.append(Launch(command, folder / f"engine-{number}.log"))

    def _is_ready(self) -> bool:
        return all(answers(url, self._model) for url in self.urls)

    def num_late(self) -> int:
        """Return how often an engine was too late. Then the machine is too slow."""
        return sum(launch.log_tail(1 << 20).count("too slow") for launch in self.launches)


class VllmFleet(SystemUnderTest):
    """Real vLLM servers with the bundled model, one CPU core each."""

    start_timeout_s = 900.0  # a machine's first start downloads the model and converts it

    def __init__(
        self, num_engines: int, settings: EngineSettings = "ours", num_sharing: int | None = None
    ) -> None:
        """`num_sharing` engines share this machine's memory in all; unset: twice these."""
        super().__init__(f"vLLM engines, {settings} settings", num_engines)
        self._settings = settings
        self._num_sharing = num_sharing or 2 * num_engines

    def _launch(self, folder: Path) -> None:
        for rank, port in enumerate(free_ports(self.num_engines)):
            self.urls.append(f"http://127.0.0.1:{port}")
            command = [
                *(sys.executable, "-m", "benchmarks.peers.vllm_server", "--port", str(port)),
                *("--rank", str(rank), "--engines", str(self._num_sharing)),
                *("--settings", self._settings),
            ]
            self.launches.append(Launch(command, folder / f"engine-{rank}.log"))

    def _is_ready(self) -> bool:
        return all(answers(url, SERVED_MODEL_NAME) for url in self.urls)
