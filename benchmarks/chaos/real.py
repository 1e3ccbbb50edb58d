"""Does every reply survive when real vLLM engines are killed and hung under load?

    python -m benchmarks.chaos.real

`headway serve` as a user starts it, with one core per engine. First every question is asked
undisturbed. Then clients send questions without a pause while signals hit engines that have
streams: SIGKILL to engine cores and to actors, SIGSTOP to cores. Some kills come in pairs, so
that for a while there is no engine at all; the next fault otherwise waits until both engines run
again. Every reply is compared with the undisturbed one, token by token.
"""

import argparse
import asyncio
import contextlib
import random
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import httpx
import psutil

from benchmarks.chaos.client import Question, Reply, send_question
from benchmarks.chaos.faults import EngineProcesses, InjectedFault, ProcessFault, schedule_faults
from benchmarks.chaos.report import Observations, fill_report
from benchmarks.chaos.verdicts import (
    TIE_NATS,
    Verdict,
    VerdictKind,
    judge,
    questions,
    vllm_continuation,
)
from benchmarks.report.report import Report
from benchmarks.report.runner import print_progress, run_and_judge
from benchmarks.systems.real_engines import RealEngines, metric_total
from router.fleet.replica import ReplicaState
from router.resilience.breaker import BreakerState
from serving.capacity.launch import MeasureError
from serving.gateway.observe.state import GatewayState

_NUM_ENGINES = 2
# Not the engines' usual bfloat16: in that many tokens are near ties, which another batch decides
# differently even without a failure. Here a text that differs should mean something.
_DTYPE = "float32"
_POLL_S = 0.5  # of the state: its log of breaker events must not overflow meanwhile
_RECOVERY_TIMEOUT_S = 240.0
_HANG_S = (7.0, 14.0)  # long after detection, long before the engine is restarted
_RESUME_DELAY = "headway_resume_delay_seconds"


@dataclass(frozen=True)
class Scenario:
    """What one run does."""

    num_kills: int
    num_pairs: int
    num_hangs: int
    max_fault_s: float  # no fault is injected later, seconds from the first
    min_requests: int
    num_workers: int
    dtype: str
    seed: int


class ChaosEngines(RealEngines):
    """Two engines with the bundled model, computed in numbers of one type."""

    def __init__(self, dtype: str) -> None:
        super().__init__(_NUM_ENGINES)
        self._dtype = dtype

    def config(self, port: int, gateway_port: int) -> dict[str, Any]:
        config = super().config(port, gateway_port)
        config["applications"][0]["args"]["engine"] = {"args": {"dtype": self._dtype}}
        return config

    async def resumptions(self) -> tuple[int, float]:
        """Return how many begun replies were resumed on another engine, and after how long.

        The mean of the seconds from when the engine failed, or was given up, to the next byte.
        """
        text = await self.ask("/metrics")
        count = metric_total(text, f"{_RESUME_DELAY}_count")
        return int(count), metric_total(text, f"{_RESUME_DELAY}_sum") / max(1.0, count)


class ChaosRun:
    """One run: load, faults, and the verdicts."""

    def __init__(
        self, scenario: Scenario, service: ChaosEngines, http: httpx.AsyncClient, model: str
    ) -> None:
        self.scenario = scenario
        self.service = service
        self.model = model
        self.questions = questions()
        self.references: dict[Question, Reply] = {}
        self.observed = Observations(TIE_NATS[scenario.dtype])
        self._http = http
        self._state: GatewayState | None = None  # as last polled
        self._rng = random.Random(f"faults {scenario.seed}")
        self._num_answered = [0] * scenario.num_workers
        self._is_over = False

    async def run(self) -> None:
        """Read undisturbed replies, send load and inject faults, then judge every reply."""
        for reply in await self._send_all_questions():
            if fault := reply.fault():
                raise MeasureError(f"an undisturbed reply is wrong: {fault}")
            self.references[reply.question] = reply
        # Once more, now from the prefix cache: replies that differ here differ without a failure.
        again = await self._send_all_questions()
        self.observed.num_undisturbed_different = sum(
            reply.token_ids != self.references[reply.question].token_ids for reply in again
        )
        await self.service.wait_until_idle()
        self.observed.before = await self.service.state()
        self.observed.num_references = len(self.references)
        num_different = self.observed.num_undisturbed_different
        print_progress(f"{len(self.references)} undisturbed replies, {num_different} vary")
        watch = asyncio.create_task(self._poll_state())
        try:
            async with asyncio.TaskGroup() as tasks:
                for number in range(self.scenario.num_workers):
                    tasks.create_task(self._send_load(number))
                await self._inject_faults()
                while len(self.observed.replies) < self.scenario.min_requests:
                    await asyncio.sleep(_POLL_S)
                self._is_over = True
            await self.service.wait_until_idle()
        finally:
            watch.cancel()
        self._keep_state(await self.service.state())
        self.observed.after = self._state
        self.observed.resumptions = await self.service.resumptions()
        await self._judge()

    async def _send_all_questions(self) -> list[Reply]:
        """Send every question once, with as many workers as later. Return the replies."""
        queue = list(reversed(self.questions))
        replies: list[Reply] = []

        async def send_questions() -> None:
            while queue:
                replies.append(await send_question(self._http, self.model, queue.pop()))

        await asyncio.gather(*(send_questions() for _ in range(self.scenario.num_workers)))
        return replies

    async def _send_load(self, number: int) -> None:
        rng = random.Random(f"worker {self.scenario.seed} {number}")
        while not self._is_over:
            reply = await send_question(self._http, self.model, rng.choice(self.questions))
            self.observed.replies.append(reply)
            self._num_answered[number] += 1

    async def _poll_state(self) -> None:
        while True:
            with contextlib.suppress(MeasureError):
                self._keep_state(await self.service.state())
            await asyncio.sleep(_POLL_S)

    def _keep_state(self, state: GatewayState) -> None:
        self._state = state
        self.observed.breaker_events |= dict.fromkeys(state.breaker_events)

    @property
    def _replicas(self) -> dict[str, ReplicaState]:
        """The engines as last polled, by id."""
        return self._state.replicas if self._state is not None else {}

    async def _inject_faults(self) -> None:
        scenario, started_s = self.scenario, time.monotonic()
        rounds = schedule_faults(
            scenario.num_kills, scenario.num_pairs, scenario.num_hangs, self._rng
        )
        for faults in rounds:
            if time.monotonic() - started_s > scenario.max_fault_s:
                print_progress("out of time: the other faults are left out")
                return
            await self._wait_until(self._are_both_running)
            hit = [await self._inject(faults[0], is_last=False)]
            if faults[1:]:
                # Until the other engine has taken over the first one's requests.
                await self._wait_until(lambda: len(self._replicas) < _NUM_ENGINES)
                hit.append(await self._inject(faults[1], is_last=True))
            await self._wait_for_recovery(hit)
            await self._wait_for_new_requests()

    async def _wait_for_new_requests(self) -> None:
        """Wait until every request that was hit has ended.

        Otherwise one request could be hit again and again, and given up (`router.max_attempts`).
        """
        before = list(self._num_answered)
        await self._wait_until(
            lambda: all(now > then for now, then in zip(self._num_answered, before, strict=True))
        )

    async def _inject(
        self, fault: ProcessFault, *, is_last: bool
    ) -> tuple[InjectedFault, EngineProcesses]:
        replica_id, processes = await self._choose_victim()
        num_streams = _num_streams(self._replicas[replica_id])
        injected = InjectedFault(fault, replica_id, num_streams, is_last)
        self.observed.faults.append(injected)
        processes.inject(fault)
        num_replies = len(self.observed.replies)
        print_progress(
            f"{fault.value}: {replica_id} with {num_streams} streams, {num_replies} replies"
        )
        return injected, processes

    async def _wait_for_recovery(self, hit: list[tuple[InjectedFault, EngineProcesses]]) -> None:
        for injected, processes in hit:
            if injected.fault is ProcessFault.HANG:
                await asyncio.sleep(self._rng.uniform(*_HANG_S))
                processes.continue_core()
        lost = {each.replica_id for each, _ in hit if each.fault is not ProcessFault.HANG}
        await self._wait_until(lambda: lost.isdisjoint(self._replicas))
        await self._wait_until(self._are_both_running)
        for injected, processes in hit:
            injected.recovered_s = time.monotonic()
            if injected.fault is not ProcessFault.HANG:
                injected.survivors = await processes.wait_for_exit()

    async def _choose_victim(self) -> tuple[str, EngineProcesses]:
        """Wait for a random while. Return an engine that has streams then, and its processes."""
        deadline_s = time.monotonic() + _RECOVERY_TIMEOUT_S
        while time.monotonic() < deadline_s:
            await asyncio.sleep(self._rng.uniform(0.5, 5.0))
            self._keep_state(await self.service.state())
            busy = [
                replica_id
                for replica_id, replica in sorted(self._replicas.items())
                if _num_streams(replica)
            ]
            if busy:
                replica_id = self._rng.choice(busy)
                with contextlib.suppress(psutil.Error, LookupError):
                    pid = self._replicas[replica_id].info.pid
                    return replica_id, EngineProcesses(pid)
        raise MeasureError(f"no engine to hit in {_RECOVERY_TIMEOUT_S:g} s")

    def _are_both_running(self) -> bool:
        """Whether both engines have streams and closed breakers."""
        replicas = self._replicas.values()
        return len(replicas) == _NUM_ENGINES and all(
            replica.breaker.state is BreakerState.CLOSED and _num_streams(replica)
            for replica in replicas
        )

    async def _wait_until(self, condition: Any) -> None:
        deadline_s = time.monotonic() + _RECOVERY_TIMEOUT_S
        while self._state is None or not condition():
            if time.monotonic() > deadline_s:
                log = self.service.launches[0].log_tail()
                raise MeasureError(f"no recovery in {_RECOVERY_TIMEOUT_S:g} s", log)
            await asyncio.sleep(_POLL_S / 2)

    async def _judge(self) -> None:
        for reply in self.observed.replies:
            if reply.error:
                continue
            question = reply.question
            reference, tie_nats = self.references[question], self.observed.tie_nats
            continue_from = vllm_continuation(
                self._http, self.model, ignore_eos=not question.ends_early
            )
            try:
                verdict = await judge(reply, reference, continue_from, tie_nats)
            except MeasureError as error:  # a reply that cannot be compared is unexplained
                print_progress(str(error))
                verdict = Verdict(VerdictKind.UNEXPLAINED)
            self.observed.verdicts.append((reply, verdict))


def _num_streams(replica: ReplicaState) -> int:
    """Return how many requests the engine has, by its last snapshot."""
    return replica.snapshot.num_inflight_reqs if replica.snapshot is not None else 0


async def run(scenario: Scenario) -> Report:
    """Run the scenario; return the report."""
    service = ChaosEngines(scenario.dtype)
    report = Report(
        "chaos-real" if scenario.dtype == _DTYPE else f"chaos-real-{scenario.dtype}",
        "measured",
        scenario.seed,
        {**asdict(scenario), "num_engines": _NUM_ENGINES},
    )
    print_progress("starting the engines")
    async with service:
        model = await service.model()
        report.config["model"] = model
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=service.urls[0], limits=limits) as http:
            chaos = ChaosRun(scenario, service, http, model)
            started_s = time.monotonic()
            await chaos.run()
        print_progress(
            f"{len(chaos.observed.replies)} replies in {time.monotonic() - started_s:.0f} s"
        )
    fill_report(report, chaos.observed)
    survivors = [title for fault in chaos.observed.faults for title in fault.survivors]
    report.add_target("processes left over", len(survivors) + len(service.killed), "== 0")
    for title in (*survivors, *service.killed):
        report.add_note(f"Left over: {title}")
    report.add_note("Engines, gateway and clients share the cores of one machine.")
    return report


def _parse() -> Scenario:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=10, help="half cores, half actors")
    parser.add_argument(
        "--pairs",
        type=int,
        default=3,
        help="kills of the last engine, each soon after another kill",
    )
    parser.add_argument("--hangs", type=int, default=4, help="one in four is for good")
    parser.add_argument(
        "--max-fault-s", type=float, default=3600.0, help="no fault later than this, seconds"
    )
    parser.add_argument("--requests", type=int, default=220, help="at least")
    parser.add_argument("--workers", type=int, default=6, help="requests open at once")
    parser.add_argument(
        "--dtype",
        choices=list(TIE_NATS),
        default=_DTYPE,
        help="number type of the engines",
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    return Scenario(
        options.kills,
        options.pairs,
        options.hangs,
        options.max_fault_s,
        options.requests,
        options.workers,
        options.dtype,
        options.seed,
    )


def main() -> int:
    scenario = _parse()
    return run_and_judge(lambda: run(scenario))


if __name__ == "__main__":
    sys.exit(main())
