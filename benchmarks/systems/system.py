"""Which systems without real engines are measured? Headway, and the floor below every path."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.systems.null_engine import MODEL
from serving.capacity.launch import Launch
from serving.capacity.service import Service, SystemUnderTest, free_ports, get_json


class Floor(SystemUnderTest):
    """Null engines, each served by uvicorn alone: no path from a client can be cheaper."""

    def __init__(self, num_engines: int) -> None:
        super().__init__("floor", num_engines)

    def _launch(self, folder: Path) -> None:
        for number, port in enumerate(free_ports(self.num_engines)):
            self.urls.append(f"http://127.0.0.1:{port}")
            command = [sys.executable, "-m", "benchmarks.systems.null_engine", "--port", str(port)]
            self.launches.append(Launch(command, folder / f"engine-{number}.log"))

    def _is_ready(self) -> bool:
        return all(get_json(f"{url}/health") is not None for url in self.urls)


class NullHeadway(Service):
    """`headway serve` with null engines."""

    start_timeout_s = 120.0

    def __init__(self, front: str, num_engines: int, num_gateways: int = 1) -> None:
        args = {
            "served_model_name": MODEL,
            "device": "cpu",
            "engine": {"factory": "benchmarks.systems.null_engine:NullEngine"},
        }
        name = front if num_gateways == 1 else f"{front}, {num_gateways} gateways"
        super().__init__(num_engines, args, front=front, name=name)
        self._num_gateways = num_gateways

    def config(self, port: int, gateway_port: int) -> dict[str, Any]:
        config = super().config(port, gateway_port)
        config["applications"][0]["args"]["gateway"]["replicas"] = self._num_gateways
        return config

    def _is_ready(self) -> bool:
        # Whichever gateway answers tells of all; of one that is alone, of itself.
        if (state := self.find_state()) is None:
            return False
        gateways = state.gateways.values() or (state,)
        know_all = all(len(each.replicas) == self.num_engines for each in gateways)
        return know_all and len(gateways) >= self._num_gateways and super()._is_ready()


class EmulatedHeadway(Service):
    """`headway serve` with emulated engines of one profile."""

    start_timeout_s = 120.0

    def __init__(
        self,
        profile: str,
        num_engines: int,
        model: str,
        router: Mapping[str, Any] | None = None,
    ) -> None:
        """`router`: settings of the router, if any."""
        args = {
            "served_model_name": model,
            "device": "cpu",
            "engine": {
                "factory": "serving.engine.emulated.engine:EmulatedEngine",
                "args": {"profile": profile},
            },
            "router": dict(router or {}),
        }
        super().__init__(num_engines, args, name="own")
