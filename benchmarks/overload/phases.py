"""Which load does each phase of an overload send, and what becomes of it?

First the capacity, then the load that the engines carry, a multiple of it, the usual load again,
and at last hostile clients.
"""

import asyncio
import itertools
import time
from collections import Counter, defaultdict
from dataclasses import dataclass

from benchmarks.load.capacity import measured_capacity
from benchmarks.load.hostile_clients import HostileClients
from benchmarks.load.mix import Mix
from benchmarks.load.returning_clients import ReturningClients, SentRequest
from benchmarks.overload.monitor import DeploymentMonitor
from benchmarks.report.report import Report, percentile
from benchmarks.report.runner import print_progress
from benchmarks.systems.processes import machine_busy_s
from benchmarks.systems.system import EmulatedHeadway
from router.simulation.figures import Slo, brief
from router.simulation.variant import OURS
from serving.capacity.client import Client

MODEL = "emulated"
MIX = Mix(short_tokens=(200, 1000), long_tokens=(3000, 6000), output_tokens=(16, 64))
HEAD_TIMEOUT_S = 20.0
PAUSE_S = 3.0
_WORKERS_PER_ENGINE = 48  # enough that an engine always has a full step
_HALF_BODY_BYTES = 1_000_000
_BOMB_BYTES = 1_000_000


@dataclass(frozen=True)
class Scenario:
    """What one run does."""

    num_engines: int
    times_capacity: float
    capacity_s: float
    usual_s: float
    overload_s: float
    num_idle: int
    num_half_sent: int
    num_bombs: int
    seed: int


class OverloadRun:
    """One run, phase by phase."""

    def __init__(
        self,
        scenario: Scenario,
        deployment: EmulatedHeadway,
        monitor: DeploymentMonitor,
        report: Report,
    ) -> None:
        self.scenario = scenario
        self.deployment = deployment
        self.monitor = monitor
        self.report = report
        self.slo = Slo()
        self.goodputs: dict[str, float] = {}  # by phase, requests per second
        self.share_beside_hostile = 0.0  # of the requests beside hostile clients that met the SLO

    async def measure_capacity(self) -> float:
        """Return the requests per second that the engines complete while they are always full."""
        self.monitor.phase = "capacity"
        scenario = self.scenario
        num_workers = _WORKERS_PER_ENGINE * scenario.num_engines
        # Under our policy, because our capacity is to be exceeded. Other policies fill the engines
        # more: they ignore the target for the time per token.
        rate = await measured_capacity(
            self.deployment, MIX, MODEL, scenario.seed, num_workers, scenario.capacity_s, OURS
        )
        print_progress(f"capacity: {brief(rate)} requests/s")
        return rate

    async def send_load(
        self, phase: str, rate: float, duration_s: float, return_every: int = 0
    ) -> list[SentRequest]:
        """Send one phase's load, wait for all replies, and report them. Return the requests."""
        self.monitor.phase = phase
        seed = f"{self.scenario.seed} {phase}"
        cpu_before, busy_before = self._cpu_s(), machine_busy_s()
        start_s = time.perf_counter()
        async with Client(self.deployment.urls) as client:
            clients = ReturningClients(client, MIX, MODEL, seed, return_every)
            await clients.send_requests(rate, duration_s)
            elapsed_s = time.perf_counter() - start_s
            cpu_s = {role: used_s - cpu_before[role] for role, used_s in self._cpu_s().items()}
            busy_s = machine_busy_s() - busy_before
            self.monitor.phase = f"after {phase}"
            await clients.wait_for_replies()
        self._report_load(phase, rate, elapsed_s, clients.sent)
        self.report.add_row(
            "cores in use",
            phase=phase,
            **{role: used / elapsed_s for role, used in sorted(cpu_s.items())},
            whole_machine=busy_s / elapsed_s,
        )
        await asyncio.sleep(PAUSE_S)
        return clients.sent

    def report_minutes(self, sent: list[SentRequest]) -> None:
        """Report goodput and refusals of each minute of the overload."""
        start_s = sent[0].record.due_s
        first = [each for each in sent if not each.is_return]
        for minute, group in itertools.groupby(
            first, key=lambda each: int((each.record.due_s - start_s) // 60)
        ):
            members = list(group)
            span_s = min(60.0, self.scenario.overload_s - 60.0 * minute)
            self.report.add_row(
                "minutes of overload",
                minute=minute + 1,
                goodput_per_s=sum(each.met(self.slo) for each in members) / span_s,
                refused_share=sum(each.is_refused for each in members) / len(members),
            )

    def report_returns(self, sent: list[SentRequest], end_s: float) -> None:
        """Report what became of the requests that were sent again after `Retry-After`."""
        for when, is_chosen in (
            ("while the overload lasts", lambda due_s: due_s <= end_s),
            ("after its end", lambda due_s: due_s > end_s),
        ):
            members = [each for each in sent if each.is_return and is_chosen(each.record.due_s)]
            if members:
                self.report.add_row(
                    "who came back by Retry-After",
                    when=when,
                    requests=len(members),
                    let_in_share=sum(not each.is_refused for each in members) / len(members),
                    kept_promise_share=sum(each.met(self.slo) for each in members) / len(members),
                )
        waits_s = [
            each.record.retry_after_s for each in sent if each.record.retry_after_s is not None
        ]
        if waits_s:
            self.report.add_row(
                "Retry-After, s",
                replies=len(waits_s),
                least=min(waits_s),
                p50=percentile(waits_s, 50),
                p99=percentile(waits_s, 99),
                most=max(waits_s),
            )

    async def connect_hostile_clients(self, rate: float) -> HostileClients:
        """Connect hostile clients, send half of `rate` beside them, wait until they are cut.

        Reports and returns what became of the hostile connections.
        """
        self.monitor.phase = "connecting"
        host, port = self.deployment.urls[0].removeprefix("http://").split(":")
        hostile = HostileClients(host, int(port))
        scenario = self.scenario
        try:
            await hostile.send_half_bodies(scenario.num_half_sent, _HALF_BODY_BYTES)
            await hostile.send_header_bombs(scenario.num_bombs, _BOMB_BYTES)
            await hostile.connect_idle(scenario.num_idle)
            print_progress(
                f"connected: {dict(hostile.connected)}; not: {dict(hostile.not_connected)}"
            )
            num_idle = hostile.connected["idle"]
            sent = await self.send_load("beside the crowd", 0.5 * rate, 10.0)
            self.share_beside_hostile = sum(each.met(self.slo) for each in sent) / len(sent)
            self.monitor.phase = "crowd"
            await hostile.wait_until_cut(3 * HEAD_TIMEOUT_S)
        finally:
            num_left = hostile.connected.total()
            hostile.close_connections()
        self.report.add_row(
            "connections that give nothing",
            idle_at_the_same_time=num_idle,
            **{
                f"{kind.replace(' ', '_').replace('-', '_')}_cut": count
                for kind, count in hostile.cut.items()
            },
            longest_until_cut_s=max(hostile.cut_after_s.values(), default=None),
            left=num_left,
        )
        answers = hostile.answers
        bombs = {status: n for (kind, status), n in answers.items() if kind == "header bomb"}
        bodies = {status: n for (kind, status), n in answers.items() if kind == "half-sent body"}
        self.report.add_note(f"Answers to header bombs: {bombs}; to half-sent bodies: {bodies}.")
        return hostile

    def _report_load(
        self, phase: str, rate: float, elapsed_s: float, sent: list[SentRequest]
    ) -> None:
        done = [each for each in sent if each.record.completed]
        ttft_s = [each.ttft_s for each in done] or [float("nan")]
        tpot_s = [each.tpot_s for each in done] or [float("nan")]
        goodput = sum(each.met(self.slo) for each in sent) / elapsed_s
        self.goodputs[phase] = goodput
        refused = [each for each in sent if each.is_refused]
        self.report.add_row(
            "load",
            phase=phase,
            asked_for_per_s=rate,
            goodput_per_s=goodput,
            completed_per_s=len(done) / elapsed_s,
            refused_share=len(refused) / len(sent),
            otherwise_failed=len(sent) - len(done) - len(refused),
            kept_promise_of_completed=sum(each.met(self.slo) for each in done) / max(1, len(done)),
            ttft_p50_s=percentile(ttft_s, 50),
            ttft_p99_s=percentile(ttft_s, 99),
            tpot_p50_s=percentile(tpot_s, 50),
            tpot_p99_s=percentile(tpot_s, 99),
            generator_late_p99_s=percentile([each.record.late_s for each in sent], 99),
        )
        print_progress(
            f"{phase}: goodput {brief(goodput)}/s, {len(refused)} of {len(sent)} refused"
        )
        for error, count in Counter(
            each.record.error for each in sent if each.record.error and not each.is_refused
        ).most_common(5):
            self.report.add_note(f"{phase}: {count} requests failed: {error}")

    def _cpu_s(self) -> defaultdict[str, float]:
        self.monitor.usage.refresh()
        used = self.monitor.usage.cpu_s()
        used["load generator"] = time.process_time()
        return used
