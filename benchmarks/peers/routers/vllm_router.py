"""vLLM's router, in Rust: https://github.com/vllm-project/router."""

from pathlib import Path

from benchmarks.peers.routers.peer import Peer
from serving.capacity.service import free_ports


class VllmRouter(Peer):
    title = "vllm-router"
    package = "vllm-router==0.1.17"
    policies = ("power_of_two", "cache_aware")

    def command(self, folder: Path, port: int) -> list[str]:
        (metrics_port,) = free_ports(1)
        return [
            *(self.binary("vllm-router"), "--host", "127.0.0.1", "--port", str(port)),
            *("--worker-urls", *self.engine_urls, "--policy", self.policy),
            *("--prometheus-port", str(metrics_port), "--log-level", "warning"),
        ]
