"""What did one run of one system show, and what did it cost?

All systems are up side by side; one at a time gets load.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.load.loops import open_loop
from benchmarks.load.mix import Mix, MixRequest
from benchmarks.report.latency import Latencies, Sample
from benchmarks.report.report import percentile
from benchmarks.report.runner import print_progress
from benchmarks.systems.processes import ResourceUsage, machine_busy_s
from serving.capacity.client import Client
from serving.capacity.service import SystemUnderTest

_NUM_CONNECTIONS = 64
_PAUSE_S = 1.0  # until the work that a run left behind is done
# Processors that other work on the machine keeps busy, of which there should be none.
MAX_OTHERS_CPU = 0.1
BUSY_ROUTER_CPU = 0.5  # of a processor: then it is the router that makes the generator late


@dataclass(frozen=True)
class CpuCost:
    """CPU seconds, from before the first send to after the last end."""

    router_s: float
    engines_s: float  # those behind the router
    others_s: float  # of processes that are no part of the benchmark


@dataclass(frozen=True)
class MeasuredRun:
    """What one run of one system showed."""

    samples: list[Sample]
    late_s: float  # how late the load generator sent, p99
    span_s: float
    cost: CpuCost

    def was_disturbed(self, max_late_s: float) -> bool:
        """Whether something else than the system under test influenced the run.

        A router that takes the processor from the load generator counts as itself.
        """
        if self.cost.others_s > MAX_OTHERS_CPU * self.span_s:
            return True
        return self.late_s > max_late_s and self.cost.router_s < BUSY_ROUTER_CPU * self.span_s


class Testbed:
    """All systems under test, up side by side, and the engines behind each."""

    def __init__(
        self,
        systems: Mapping[str, SystemUnderTest],
        engines: Mapping[str, SystemUnderTest],
        timeout_s: float,
    ) -> None:
        """`engines`: those behind each system. A request fails that has not ended `timeout_s`
        after the last arrival."""
        self._systems = systems
        self._engines = engines
        self._timeout_s = timeout_s

    async def measure_run(
        self,
        name: str,
        requests: Sequence[MixRequest],
        mix: Mix,
        model: str,
        repeat: int,
        salt: str,
    ) -> MeasuredRun:
        """Send the requests to one system; return what it showed. Repeat -1 warms up."""
        system = self._systems[name]
        arrivals = [(each.offset_s, mix.api_request(each, model, salt)) for each in requests]
        before = await asyncio.to_thread(self._cpu_s, name)
        start_s = time.perf_counter()
        async with Client(system.urls) as client:
            await client.connect(_NUM_CONNECTIONS)
            records = await open_loop(client, arrivals, self._timeout_s)
        span_s = time.perf_counter() - start_s
        after = await asyncio.to_thread(self._cpu_s, name)
        await asyncio.sleep(_PAUSE_S)
        samples = [
            Sample.of(repeat, name, request, record)
            for request, record in zip(requests, records, strict=True)
        ]
        late_s = percentile([record.late_s for record in records], 99)
        cost = CpuCost(*(end - begin for begin, end in zip(before, after, strict=True)))
        run = MeasuredRun(samples, late_s, span_s, cost)
        _print_run(run, name, repeat)
        return run

    def _cpu_s(self, name: str) -> tuple[float, float, float]:
        """Return the CPU seconds used so far, in the order of `CpuCost`."""
        launches = {
            launch
            for system in (*self._systems.values(), *self._engines.values())
            for launch in system.launches
        }
        ours = time.process_time()
        used = {}
        for launch in launches:
            usage = ResourceUsage(launch)
            usage.refresh()
            used[launch] = usage.cpu_s()
            ours += sum(used[launch].values())
        others_s = machine_busy_s() - ours
        system, engines = self._systems[name], self._engines[name]
        engines_s = sum(used[launch]["engines"] for launch in engines.launches)
        # Of one that starts its engines itself, only what routes: Ray's own processes idle beside
        # Headway's gateway, in the runs of all systems.
        brings_engines = system is engines
        router_s = sum(
            used[launch]["gateway"] + used[launch]["front"]
            if brings_engines
            else sum(used[launch].values())
            for launch in system.launches
        )
        return router_s, engines_s, others_s


def _print_run(run: MeasuredRun, name: str, repeat: int) -> None:
    title = f"repeat {repeat + 1}" if repeat >= 0 else "warming up"
    print_progress(
        f"{title}: {name:24} {Latencies(run.samples).summary(name)}, sent "
        f"{1e3 * run.late_s:.0f} ms late (p99), others' CPU {run.cost.others_s:.1f} s"
    )
