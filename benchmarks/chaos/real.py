"""Two real vLLM engines killed and hung under load: `python -m benchmarks.chaos.real`.

`headway serve` as a user starts it, on one core per engine. Replies of an
undisturbed run come first. Then streams go on without a pause while signals hit
engines that have streams: SIGKILL to engine cores and to actors, SIGSTOP to
cores. Some kills come in pairs, so that for a while there is no engine at all; else
the next one waits until both engines are at work again. Every reply is compared
with the undisturbed one, token by token.
"""

import argparse
import asyncio
import contextlib
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx
import psutil

from benchmarks.chaos.client import Question, Reply, ask
from benchmarks.chaos.faults import EngineProcesses, Fault, Inflicted, schedule
from benchmarks.chaos.report import Observed, fill
from benchmarks.chaos.verdicts import TIE_NATS, Kind, Verdict, judge, questions, vllm_going_on
from benchmarks.policies.comparison import say
from benchmarks.report.report import Report
from benchmarks.report.runner import run_and_judge
from benchmarks.systems.real_engines import RealEngines, total
from router.fleet.replica import ReplicaState
from router.resilience.breaker import BreakerState
from serving.capacity.launch import MeasureError
from serving.gateway.metrics import GatewayState

_NUM_ENGINES = 2
# Not the engines' usual bfloat16, in which many a choice is a near tie that the next batch
# turns, with or without a failure: here a text that differs should mean something.
_DTYPE = "float32"
_POLL_S = 0.5  # of the state, with its log of breakers: never more than a few new lines
_RECOVERY_TIMEOUT_S = 240.0
_HANG_S = (7.0, 14.0)  # well past detection, well before the engine is started anew
_RESUME_DELAY = "headway_resume_delay_seconds"


@dataclass(frozen=True)
class Plan:
    """What is done."""

    num_kills: int
    num_pairs: int
    num_hangs: int
    max_fault_s: float  # no fault begins later, counted from the first
    min_requests: int
    num_workers: int
    dtype: str
    seed: int


class ChaosEngines(RealEngines):
    """The bundled model, computed in numbers of this type."""

    def __init__(self, dtype: str) -> None:
        super().__init__(_NUM_ENGINES)
        self._dtype = dtype

    def config(self, port: int, gateway_port: int) -> dict[str, Any]:
        config = super().config(port, gateway_port)
        config["applications"][0]["args"]["engine"] = {"args": {"dtype": self._dtype}}
        return config

    async def resumed(self) -> tuple[int, float]:
        """Return how many replies that had begun have gone on elsewhere, and after how long.

        Mean seconds from the engine's failure, or from its being left, to the next byte.
        """
        text = await self.ask("/metrics")
        count = total(text, f"{_RESUME_DELAY}_count")
        return int(count), total(text, f"{_RESUME_DELAY}_sum") / max(1.0, count)


class Chaos:
    """One run."""

    def __init__(self, plan: Plan, subject: ChaosEngines, http: httpx.AsyncClient, model: str):
        self.plan = plan
        self.subject = subject
        self.model = model
        self.questions = questions()
        self.references: dict[Question, Reply] = {}
        self.seen = Observed(TIE_NATS[plan.dtype])
        self._http = http
        self._state: GatewayState | None = None  # as last seen
        self._rng = random.Random(f"faults {plan.seed}")
        self._num_answered = [0] * plan.num_workers
        self._is_over = False

    async def run(self) -> None:
        """Undisturbed replies, then load and faults, then the verdicts."""
        for reply in await self._ask_all():
            if fault := reply.fault():
                raise MeasureError(f"an undisturbed reply is wrong: {fault}")
            self.references[reply.question] = reply
        # Once more, now with a prefix cache: what differs here, differs without any failure.
        again = await self._ask_all()
        self.seen.num_undisturbed_different = sum(
            reply.token_ids != self.references[reply.question].token_ids for reply in again
        )
        await self.subject.wait_until_idle()
        self.seen.before = await self.subject.state()
        self.seen.num_references = len(self.references)
        num_different = self.seen.num_undisturbed_different
        say(f"{len(self.references)} undisturbed replies, {num_different} vary")
        watch = asyncio.create_task(self._watch())
        try:
            async with asyncio.TaskGroup() as tasks:
                for number in range(self.plan.num_workers):
                    tasks.create_task(self._work(number))
                await self._disturb()
                while len(self.seen.replies) < self.plan.min_requests:
                    await asyncio.sleep(_POLL_S)
                self._is_over = True
            await self.subject.wait_until_idle()
        finally:
            watch.cancel()
        self._look(await self.subject.state())
        self.seen.after = self._state
        self.seen.resumed = await self.subject.resumed()
        await self._judge()

    async def _ask_all(self) -> list[Reply]:
        """Every question once, as many at a time as later."""
        queue = list(reversed(self.questions))
        replies: list[Reply] = []

        async def work() -> None:
            while queue:
                replies.append(await ask(self._http, self.model, queue.pop()))

        await asyncio.gather(*(work() for _ in range(self.plan.num_workers)))
        return replies

    async def _work(self, number: int) -> None:
        rng = random.Random(f"worker {self.plan.seed} {number}")
        while not self._is_over:
            self.seen.replies.append(await ask(self._http, self.model, rng.choice(self.questions)))
            self._num_answered[number] += 1

    async def _watch(self) -> None:
        while True:
            with contextlib.suppress(MeasureError):
                self._look(await self.subject.state())
            await asyncio.sleep(_POLL_S)

    def _look(self, state: GatewayState) -> None:
        self._state = state
        self.seen.breaker_events |= dict.fromkeys(state.breaker_events)

    @property
    def _replicas(self) -> dict[str, ReplicaState]:
        """The engines as last seen, by id."""
        return self._state.replicas if self._state is not None else {}

    async def _disturb(self) -> None:
        plan, started_s = self.plan, time.monotonic()
        for faults in schedule(plan.num_kills, plan.num_pairs, plan.num_hangs, self._rng):
            if time.monotonic() - started_s > plan.max_fault_s:
                say("out of time: the other faults are left out")
                return
            await self._until(self._are_both_at_work)
            hit = [await self._inflict(faults[0], is_last=False)]
            if faults[1:]:
                # Until the other one has what this one had.
                await self._until(lambda: len(self._replicas) < _NUM_ENGINES)
                hit.append(await self._inflict(faults[1], is_last=True))
            await self._recover(hit)
            await self._until_all_are_others()

    async def _until_all_are_others(self) -> None:
        """Let who has been hit come to an end.

        A request under which four engines fail in a row without a token between is given up
        (`router.max_attempts`).
        """
        before = list(self._num_answered)
        await self._until(
            lambda: all(now > then for now, then in zip(self._num_answered, before, strict=True))
        )

    async def _inflict(self, fault: Fault, *, is_last: bool) -> tuple[Inflicted, EngineProcesses]:
        replica_id, processes = await self._victim()
        num_streams = _num_streams(self._replicas[replica_id])
        inflicted = Inflicted(fault, replica_id, num_streams, is_last)
        self.seen.faults.append(inflicted)
        processes.inflict(fault)
        num_replies = len(self.seen.replies)
        say(f"{fault.value}: {replica_id} with {num_streams} streams, {num_replies} replies")
        return inflicted, processes

    async def _recover(self, hit: list[tuple[Inflicted, EngineProcesses]]) -> None:
        for inflicted, processes in hit:
            if inflicted.fault is Fault.HANG:
                await asyncio.sleep(self._rng.uniform(*_HANG_S))
                processes.go_on()
        lost = {each.replica_id for each, _ in hit if each.fault is not Fault.HANG}
        await self._until(lambda: lost.isdisjoint(self._replicas))
        await self._until(self._are_both_at_work)
        for inflicted, processes in hit:
            inflicted.recovered_s = time.monotonic()
            if inflicted.fault is not Fault.HANG:
                inflicted.outlived = await processes.outlived()

    async def _victim(self) -> tuple[str, EngineProcesses]:
        """Some engine that has streams, at some moment of these."""
        deadline_s = time.monotonic() + _RECOVERY_TIMEOUT_S
        while time.monotonic() < deadline_s:
            await asyncio.sleep(self._rng.uniform(0.5, 5.0))
            self._look(await self.subject.state())
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

    def _are_both_at_work(self) -> bool:
        """Breakers closed, and both have streams."""
        replicas = self._replicas.values()
        return len(replicas) == _NUM_ENGINES and all(
            replica.breaker.state is BreakerState.CLOSED and _num_streams(replica)
            for replica in replicas
        )

    async def _until(self, condition: Any) -> None:
        deadline_s = time.monotonic() + _RECOVERY_TIMEOUT_S
        while self._state is None or not condition():
            if time.monotonic() > deadline_s:
                log = self.subject.launches[0].log_tail()
                raise MeasureError(f"no recovery in {_RECOVERY_TIMEOUT_S:g} s", log)
            await asyncio.sleep(_POLL_S / 2)

    async def _judge(self) -> None:
        for reply in self.seen.replies:
            if reply.error:
                continue
            question = reply.question
            go_on = vllm_going_on(self._http, self.model, ignore_eos=not question.ends_early)
            try:
                verdict = await judge(reply, self.references[question], go_on, self.seen.tie_nats)
            except MeasureError as error:  # what cannot be compared is not explained
                say(str(error))
                verdict = Verdict(Kind.UNEXPLAINED)
            self.seen.verdicts.append((reply, verdict))


def _num_streams(replica: ReplicaState) -> int:
    """How many requests the engine has, by its last snapshot."""
    return replica.snapshot.num_inflight_reqs if replica.snapshot is not None else 0


async def run(plan: Plan) -> Report:
    """Carry out the plan."""
    subject = ChaosEngines(plan.dtype)
    report = Report(
        "chaos-real" if plan.dtype == _DTYPE else f"chaos-real-{plan.dtype}",
        "measured",
        plan.seed,
        {**asdict(plan), "num_engines": _NUM_ENGINES},
    )
    say("starting the engines")
    async with subject:
        model = await subject.model()
        report.config["model"] = model
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=subject.urls[0], limits=limits) as http:
            chaos = Chaos(plan, subject, http, model)
            started_s = time.monotonic()
            await chaos.run()
        say(f"{len(chaos.seen.replies)} replies in {time.monotonic() - started_s:.0f} s")
    fill(report, chaos.seen)
    outlived = [title for fault in chaos.seen.faults for title in fault.outlived]
    report.target("processes left over", len(outlived) + len(subject.killed), "== 0")
    for title in (*outlived, *subject.killed):
        report.note(f"Left over: {title}")
    report.note("Engines, gateway and clients share the cores of one machine.")
    return report


def _parse(arguments: Sequence[str] | None) -> Plan:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=10, help="half cores, half actors")
    parser.add_argument("--pairs", type=int, default=3, help="so many kills hit the last engine")
    parser.add_argument("--hangs", type=int, default=4, help="every fourth for good")
    parser.add_argument("--max-fault-s", type=float, default=3600.0, help="no fault later")
    parser.add_argument("--requests", type=int, default=220, help="at least")
    parser.add_argument("--workers", type=int, default=6, help="requests open at any time")
    parser.add_argument(
        "--dtype",
        choices=list(TIE_NATS),
        default=_DTYPE,
        help="what engines compute in",
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    return Plan(
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
    plan = _parse(None)
    return run_and_judge(lambda: run(plan))


if __name__ == "__main__":
    sys.exit(main())
