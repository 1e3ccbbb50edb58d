"""Shepherd Model Gateway, in Rust, a successor of sglang-router."""

from pathlib import Path

from benchmarks.peers.routers.peer import Peer
from serving.capacity.service import free_ports


class Smg(Peer):
    title = "smg"
    package = "smg==1.13.0"
    policies = ("least_load", "cache_aware")

    def command(self, folder: Path, port: int) -> list[str]:
        (metrics_port,) = free_ports(1)
        return [
            *(self.binary("smg"), "launch", "--host", "127.0.0.1", "--port", str(port)),
            *("--worker-urls", *self.engine_urls, "--policy", self.policy),
            *("--prometheus-port", str(metrics_port), "--log-level", "warn"),
        ]
