"""One subject's turn: the load it gets, what became of it, and what it cost."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.load.loops import open_loop
from benchmarks.load.mix import Ask, Mix
from benchmarks.policies.comparison import say
from benchmarks.report.latency import Latencies, Sample
from benchmarks.report.report import percentile
from benchmarks.systems.processes import ResourceUsage, machine_busy_s
from router.simulation.figures import brief
from serving.capacity.client import Client
from serving.capacity.service import Service, SystemUnderTest

_NUM_CONNECTIONS = 64
_PAUSE_S = 1.0  # what the turn before left behind is over
# Processors that other work on the machine keeps busy, of which there should be none.
MAX_OTHERS_CPU = 0.1
BUSY_ROUTER_CPU = 0.5  # of a processor: then it is the router that makes the generator late


@dataclass(frozen=True)
class Cost:
    """CPU seconds, from before the first send to after the last end."""

    router_s: float
    engines_s: float  # those behind the router
    others_s: float  # whatever else the machine did: nothing of the benchmark's


@dataclass(frozen=True)
class Turn:
    """What a turn showed."""

    samples: list[Sample]
    late_s: float  # how late requests were sent, p99: the generator's own shortcoming
    span_s: float
    cost: Cost

    def was_disturbed(self, max_late_s: float) -> bool:
        """Whether it shows something else than the subject.

        A router that takes the processor from the generator is measured with that.
        """
        if self.cost.others_s > MAX_OTHERS_CPU * self.span_s:
            return True
        return self.late_s > max_late_s and self.cost.router_s < BUSY_ROUTER_CPU * self.span_s


class Stage:
    """Everything that is up, and whose turn it is."""

    def __init__(
        self,
        subjects: Mapping[str, SystemUnderTest],
        engines: Mapping[str, SystemUnderTest],
        timeout_s: float,
    ) -> None:
        """`engines`: those behind each of the subjects. What has not ended `timeout_s` after the
        last arrival has failed."""
        self._timeout_s = timeout_s
        self.subjects = subjects
        self._engines = engines

    async def take_turn(
        self, name: str, asks: Sequence[Ask], mix: Mix, model: str, repeat: int, salt: str
    ) -> Turn:
        """Send the requests to one subject; repeat -1 warms up."""
        subject = self.subjects[name]
        arrivals = [(ask.offset_s, mix.call(ask, model, salt)) for ask in asks]
        before = await asyncio.to_thread(self._costs, name)
        start_s = time.perf_counter()
        async with Client(subject.urls) as client:
            await client.connect(_NUM_CONNECTIONS)
            records = await open_loop(client, arrivals, self._timeout_s)
        span_s = time.perf_counter() - start_s
        after = await asyncio.to_thread(self._costs, name)
        await asyncio.sleep(_PAUSE_S)
        samples = [
            Sample.of(repeat, name, ask, record) for ask, record in zip(asks, records, strict=True)
        ]
        late_s = percentile([record.late_s for record in records], 99)
        cost = Cost(*(end - begin for begin, end in zip(before, after, strict=True)))
        turn = Turn(samples, late_s, span_s, cost)
        _say(turn, name, repeat)
        return turn

    def _costs(self, name: str) -> tuple[float, float, float]:
        """CPU seconds so far, as in `Cost`."""
        launches = {
            launch
            for subject in (*self.subjects.values(), *self._engines.values())
            for launch in subject.launches
        }
        ours = time.process_time()
        used = {}
        for launch in launches:
            usage = ResourceUsage(launch)
            usage.refresh()
            used[launch] = usage.cpu_s()
            ours += sum(used[launch].values())
        others_s = machine_busy_s() - ours
        subject, engines = self.subjects[name], self._engines[name]
        engines_s = sum(used[launch]["engines"] for launch in engines.launches)
        # Ray's own processes idle beside Headway's gateway, and do so in everybody's turn.
        is_headway = isinstance(subject, Service)
        router_s = sum(
            used[launch]["gateway"] if is_headway else sum(used[launch].values())
            for launch in subject.launches
        )
        return router_s, engines_s, others_s


def _say(turn: Turn, name: str, repeat: int) -> None:
    found = Latencies(turn.samples)
    figures = [
        f"{kind} p{percent} {'-' if value is None else brief(value)} s"
        for kind, percent in (("short", 50), ("short", 99), ("long", 99))
        for value in [found.ttft_s(name, kind, percent)]
    ]
    num_failed = sum(not sample.completed for sample in turn.samples)
    title = f"repeat {repeat + 1}" if repeat >= 0 else "warming up"
    say(
        f"{title}: {name:24} {', '.join(figures)}; {len(turn.samples)} requests, {num_failed} "
        f"failed, sent {1e3 * turn.late_s:.0f} ms late (p99)"
        f", others' CPU {turn.cost.others_s:.1f} s"
    )
