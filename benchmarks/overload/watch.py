"""Memory, queue and breakers of a deployment, looked at every second or so."""

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
from serving.gateway.metrics import GatewayState

_INTERVAL_S = 1.0


@dataclass(frozen=True)
class Look:
    """One moment."""

    at_s: float  # from the first look
    phase: str
    gateway_mb: float  # resident, shared pages included
    engines_mb: float  # of all of them
    num_held: int = 0  # these are 0 where the gateway did not say
    num_placed: int = 0
    held_mb: float = 0.0  # bodies in the hold queue
    record_mb: float = 0.0
    num_open_breakers: int = 0
    is_overloaded: bool = False


@dataclass
class Watch:
    """Looks until told to stop."""

    usage: ResourceUsage
    find_state: Callable[[], GatewayState | None]
    phase: str = "idle"
    looks: list[Look] = field(default_factory=list)
    _start_s: float = field(default_factory=time.monotonic)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Look while the body runs."""
        self.usage.refresh()
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()

    async def _run(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(_INTERVAL_S)

    async def look(self) -> Look:
        """Look now."""
        state = await asyncio.to_thread(self.find_state)
        look = Look(
            at_s=time.monotonic() - self._start_s,
            phase=self.phase,
            gateway_mb=self.usage.rss_bytes("gateway") / 1e6,
            engines_mb=self.usage.rss_bytes("engines") / 1e6,
            **(_seen_in(state) if state is not None else {}),
        )
        self.looks.append(look)
        return look

    def during(self, phase: str) -> list[Look]:
        """The looks of one phase."""
        return [look for look in self.looks if look.phase == phase]

    def write(self, path: Path) -> None:
        """One line per look."""
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [each.name for each in fields(Look)])
            writer.writeheader()
            for look in self.looks:
                row = asdict(look)
                writer.writerow(
                    {
                        name: f"{value:.3f}" if isinstance(value, float) else value
                        for name, value in row.items()
                    }
                )


def _seen_in(state: GatewayState) -> dict[str, Any]:
    """Return what a look takes from the gateway's state."""
    breakers = (replica.breaker for replica in state.replicas.values())
    return {
        "num_held": state.held.num_requests,
        "num_placed": state.num_placed,
        "held_mb": state.held.num_bytes / 1e6,
        "record_mb": state.num_record_bytes / 1e6,
        "num_open_breakers": sum(each.state is not BreakerState.CLOSED for each in breakers),
        "is_overloaded": any(state.is_overloaded.values()),
    }
