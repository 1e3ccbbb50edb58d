"""How do memory, queue and breakers of a deployment go? They are read every second."""

import asyncio
import contextlib
import csv
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from benchmarks.systems.processes import ResourceUsage
from router.resilience.breaker import BreakerState
from serving.gateway.observe.state import GatewayState

_INTERVAL_S = 1.0


@dataclass(frozen=True)
class Observation:
    """What was read at one moment. Zero for what the gateway did not say."""

    at_s: float  # from the first observation
    phase: str
    gateway_mb: float  # resident, shared pages included
    engines_mb: float  # of all engines together
    num_held: int = 0
    num_placed: int = 0
    held_mb: float = 0.0  # bodies in the hold queue
    record_mb: float = 0.0
    num_open_breakers: int = 0
    is_overloaded: bool = False


@dataclass
class DeploymentMonitor:
    """Observations of a deployment, each with the phase that is on."""

    usage: ResourceUsage
    find_state: Callable[[], GatewayState | None]
    phase: str = "idle"
    observations: list[Observation] = field(default_factory=list)
    _start_s: float = field(default_factory=time.monotonic)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Observe while the body runs."""
        self.usage.refresh()
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()

    async def observe(self) -> Observation:
        """Add an observation of this moment, and return it."""
        state = await asyncio.to_thread(self.find_state)
        observation = Observation(
            at_s=time.monotonic() - self._start_s,
            phase=self.phase,
            gateway_mb=self.usage.rss_bytes("gateway") / 1e6,
            engines_mb=self.usage.rss_bytes("engines") / 1e6,
            **(_figures_of(state) if state is not None else {}),
        )
        self.observations.append(observation)
        return observation

    def during(self, phase: str) -> list[Observation]:
        """Return the observations of one phase."""
        return [each for each in self.observations if each.phase == phase]

    def write_csv(self, path: Path) -> None:
        """Write one line per observation."""
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [each.name for each in fields(Observation)])
            writer.writeheader()
            for observation in self.observations:
                row = asdict(observation)
                writer.writerow(
                    {
                        name: f"{value:.3f}" if isinstance(value, float) else value
                        for name, value in row.items()
                    }
                )

    async def _run(self) -> None:
        while True:
            await self.observe()
            await asyncio.sleep(_INTERVAL_S)


def _figures_of(state: GatewayState) -> dict[str, Any]:
    """Return what an observation keeps of the gateway's state."""
    breakers = (replica.breaker for replica in state.replicas.values())
    return {
        "num_held": state.held.num_requests,
        "num_placed": state.num_placed,
        "held_mb": state.held.num_bytes / 1e6,
        "record_mb": state.num_record_bytes / 1e6,
        "num_open_breakers": sum(each.state is not BreakerState.CLOSED for each in breakers),
        "is_overloaded": any(state.is_overloaded.values()),
    }
