"""`headway attach`: our router before servers that it has not started."""

import sys
from pathlib import Path

from benchmarks.peers.routers.peer import Peer, answers
from benchmarks.report import provenance
from serving.capacity.service import get_json


class Attached(Peer):
    title = "headway attach"
    policies = ("",)

    @classmethod
    def install(cls) -> str:
        return f"headway {(provenance.commit()['id'] or 'unknown')[:12]}"

    def command(self, folder: Path, port: int) -> list[str]:
        return [
            *(sys.executable, "-m", "serving.cli.main", "attach", *self.engine_urls),
            *("--port", str(port)),
        ]

    def _is_ready(self) -> bool:
        state = get_json(f"{self.urls[0]}/headway/state")
        if state is None or len(state["replicas"]) < self.num_engines:
            return False
        return answers(self.urls[0], self.model)
