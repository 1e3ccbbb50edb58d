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

_INTERVAL_S = 1.0


@dataclass(frozen=True)
class Look:
    """One moment."""

    at_s: float  # from the first look
    phase: str
    gateway_mb: float  # resident, shared pages included
    engines_mb: float  # of all of them
    num_held: int
    num_placed: int
    held_mb: float  # bodies in the hold queue
    record_mb: float
    num_open_breakers: int
    is_overloaded: bool


@dataclass
class Watch:
    """Looks until told to stop."""

    usage: ResourceUsage
    get_state: Callable[[], dict[str, Any] | None]
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
        state = await asyncio.to_thread(self.get_state) or {}
        replicas = state.get("replicas", {}).values()
        look = Look(
            at_s=time.monotonic() - self._start_s,
            phase=self.phase,
            gateway_mb=self.usage.rss_bytes("gateway") / 1e6,
            engines_mb=self.usage.rss_bytes("engines") / 1e6,
            num_held=state.get("held", {}).get("num_requests", 0),
            num_placed=state.get("num_placed", 0),
            held_mb=state.get("held", {}).get("num_bytes", 0) / 1e6,
            record_mb=state.get("num_record_bytes", 0) / 1e6,
            num_open_breakers=sum(each["breaker"]["state"] != "closed" for each in replicas),
            is_overloaded=any(state.get("is_overloaded", {}).values()),
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
