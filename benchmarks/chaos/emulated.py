"""Does every reply survive when emulated engines fail under load?

    python -m benchmarks.chaos.emulated

The deployed gateway, its listener and the engines' stream servers run in one process. Faults hit
random engines at random times, several at once. Every reply is compared with that of an
undisturbed run. Each prompt has a reply of its own, and an engine that goes on with one makes it
of the token ids in its record: a lost byte, another's reply and a wrong record all show. The
engines are vLLM's scheduler at a profile's step times, without a model
(`serving.engine.emulated.engine`).
"""

import argparse
import asyncio
import enum
import itertools
import random
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace

import httpx

from benchmarks.chaos.checks import check_probes, splice_gaps_s
from benchmarks.chaos.client import Question, Reply, send_question
from benchmarks.chaos.in_process import (
    MODEL,
    add_engines,
    config_of_engines,
    make_engine,
    note_engines,
    open_gateway,
    report_leftovers,
)
from benchmarks.report.report import Report, percentile
from benchmarks.report.runner import print_progress, run_and_judge
from benchmarks.systems.faulty_engine import FaultyEngine, FaultyFleet
from router import RejectReason, Request, RouterSettings
from serving.capacity.launch import MeasureError
from serving.gateway.app import Gateway

_MAX_ATTEMPTS = RouterSettings().max_attempts
_REFUSAL = RejectReason.ENDS_ENGINES.value
_DETECTED_WITHIN_S = 6.0
_SIZES = (20, 50, 120)  # tokens of a reply
_QUESTIONS = [Question(f"Count from {n}.", size) for n in range(16) for size in _SIZES]
_RESTART_S = (0.5, 3.0)  # the shortest and longest absence of a lost engine
_PAUSE_S = 7.0  # of hangs and silences


class EmulatedFault(enum.Enum):
    """One way for an emulated engine to fail."""

    RESET = "connections broken, engine lost"
    DEATH = "engine core dead: every stream says so"
    HANG = f"no step for {_PAUSE_S:g} s, snapshots go on"
    SILENCE = f"no snapshot for {_PAUSE_S:g} s, tokens go on"


@dataclass(frozen=True)
class Scenario:
    """What one run does."""

    num_engines: int
    num_requests: int
    num_workers: int
    fault_every_s: float  # on average
    seed: int
    faults: tuple[EmulatedFault, ...] = tuple(EmulatedFault)


class ChaosRun:
    """One run: load, faults, and the replies."""

    def __init__(self, scenario: Scenario, gateway: Gateway, http: httpx.AsyncClient) -> None:
        self.scenario = scenario
        self.gateway = gateway
        self.replies: list[Reply] = []
        self.faults: list[tuple[float, EmulatedFault]] = []
        self.texts: dict[Question, str] = {}  # undisturbed
        self.resume_delays_s: list[float] = []
        self._http = http
        self._rng = random.Random(f"fleet {scenario.seed}")
        self._num_left = scenario.num_requests
        engines = [FaultyEngine(make_engine(rank)) for rank in range(scenario.num_engines)]
        self.fleet = FaultyFleet(engines, gateway.driver.engines.set_members)
        self._failing: set[FaultyEngine] = set()
        self._observe_resume = gateway.metrics.observe_resume
        gateway.metrics.observe_resume = self._keep_resume_delay  # type: ignore[method-assign]

    def _keep_resume_delay(self, request: Request, delay_s: float) -> None:
        """Keep each value of `headway_resume_delay_seconds`: the metric itself keeps buckets."""
        self.resume_delays_s.append(delay_s)
        self._observe_resume(request, delay_s)

    async def run(self) -> None:
        """Read undisturbed replies, then send load and inject faults."""
        await add_engines(self.fleet, self.gateway)
        for reply in await asyncio.gather(*map(self._read_reply, _QUESTIONS)):
            if reply.error:
                raise MeasureError(f"an undisturbed reply failed: {reply.error}")
            self.texts[reply.question] = reply.text
        if len(set(self.texts.values())) < len(_QUESTIONS):
            raise MeasureError("two questions have the same reply: it could be either's")
        async with asyncio.TaskGroup() as tasks:
            faults = tasks.create_task(self._inject_faults(tasks))
            workers = [
                tasks.create_task(self._send_load(n)) for n in range(self.scenario.num_workers)
            ]
            await asyncio.gather(*workers)
            faults.cancel()

    async def _read_reply(self, question: Question) -> Reply:
        return await send_question(self._http, MODEL, question)

    async def _send_load(self, number: int) -> None:
        rng = random.Random(f"worker {self.scenario.seed} {number}")
        while self._num_left > 0:
            self._num_left -= 1
            # A body of its own: what ends two engines, as chance will have it, is refused.
            question = replace(rng.choice(_QUESTIONS), user=f"{number} {self._num_left}")
            self.replies.append(await self._read_reply(question))
            if len(self.replies) % 1000 == 0:
                print_progress(f"{len(self.replies)} replies, {len(self.faults)} faults")

    async def _inject_faults(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            await asyncio.sleep(self._rng.expovariate(1.0 / self.scenario.fault_every_s))
            well = [engine for engine in self.fleet.engines if engine not in self._failing]
            if well:
                tasks.create_task(
                    self._inject(self._rng.choice(well), self._rng.choice(self.scenario.faults))
                )

    async def _inject(self, engine: FaultyEngine, fault: EmulatedFault) -> None:
        self._failing.add(engine)
        self.faults.append((time.monotonic(), fault))
        if fault in (EmulatedFault.RESET, EmulatedFault.DEATH):
            if fault is EmulatedFault.DEATH:
                engine.dead = True
                await asyncio.sleep(0.25)  # until its process has exited
            await self.fleet.remove_engine(engine)
            await asyncio.sleep(self._rng.uniform(*_RESTART_S))
            engine.recover()
            await self.fleet.add_engine(engine)
        else:
            if fault is EmulatedFault.HANG:
                engine.hang()
            else:
                engine.is_silent = True
            await asyncio.sleep(_PAUSE_S)
            engine.recover()
        self._failing.discard(engine)

    def fill_report(self, report: Report) -> None:
        """Judge the replies; add figures and targets."""
        state = self.gateway.state()
        errors = Counter(reply.error for reply in self.replies if reply.error)
        refused = Counter({error: n for error, n in errors.items() if _REFUSAL in error})
        failed = errors - refused
        whole = [reply for reply in self.replies if not reply.error]
        different = [
            reply
            for reply in whole
            if reply.text != self.texts[replace(reply.question, user="")]
            or len(reply.response_ids) != 1
            or len(reply.dates) != 1
            or [usage["completion_tokens"] for usage in reply.usages] != [reply.question.num_tokens]
        ]
        kinds = Counter(fault for _, fault in self.faults)
        for fault in EmulatedFault:
            report.add_row("faults", fault=fault.value, times=kinds[fault])
        report.add_row(
            "replies",
            sent=len(self.replies),
            failed=failed.total(),
            taken_for_poison=refused.total(),
            different=len(different),
            retries_and_resumptions=state.retries.num_made,
        )
        gaps_s = splice_gaps_s(whole, [at_s for at_s, _ in self.faults], _DETECTED_WITHIN_S)
        for what, values_s in (
            ("for the client, beyond its usual pause", gaps_s),
            ("from the failure's notice to the next byte", self.resume_delays_s),
        ):
            if values_s:
                report.add_row(
                    "extra delay at the seam, s",
                    what=what,
                    times=len(values_s),
                    p50=percentile(values_s, 50),
                    p99=percentile(values_s, 99),
                    most=max(values_s),
                )
        usual_s = sorted(
            after - before for reply in whole for before, after in itertools.pairwise(reply.times_s)
        )
        report.add_row(
            "between two chunks, s",
            p50=percentile(usual_s, 50),
            p99=percentile(usual_s, 99),
        )
        _, wrong_probes = check_probes(state.breaker_events)
        report.add_target("streamed requests", len(self.replies), ">= 5000")
        report.add_target("failed requests", failed.total(), "== 0")
        report.add_target("replies that differ", len(different), "== 0")
        report.add_target("probes beyond one per half-open", len(wrong_probes), "== 0")
        report_leftovers(report, state)
        outcomes = {name: count for name, count in state.outcomes.items() if count}
        report.add_note(f"Outcomes as the gateway counts them: {outcomes}.")
        report.add_note(
            "Delay for the client: the longest pause of a reply, less its median pause, if it "
            f"begins within {_DETECTED_WITHIN_S:g} s of a fault and is at least five times the "
            "median. After a hang or a silence most of it is the time until the fault is detected "
            "(router.hang_s, router.stale_s)."
        )
        report.add_note(
            f"A request is given up when {_MAX_ATTEMPTS} engines in a row have failed under it and "
            "its reply got no further meanwhile (router.max_attempts)."
        )
        note_engines(report)
        report.add_note(
            "Taken for poison: two faults, a few seconds apart, hit two engines at the prefill of "
            "one request, the second one while it was alone there. No request is at fault; with "
            "a fault every few seconds that happens by chance (docs/reliability.md)."
        )
        for error, count in errors.items():
            report.add_note(f"Failed {count} times: {error}")


async def run(scenario: Scenario) -> Report:
    """Run the scenario; return the report."""
    faults = {"faults": [fault.name for fault in scenario.faults]}
    config = asdict(scenario) | faults | config_of_engines()
    report = Report("chaos-fleet", "emulated", scenario.seed, config)
    async with open_gateway() as (gateway, http):
        chaos = ChaosRun(scenario, gateway, http)
        started_s = time.monotonic()
        await chaos.run()
        print_progress(f"{len(chaos.replies)} replies in {time.monotonic() - started_s:.0f} s")
        chaos.fill_report(report)
    return report


def _parse() -> Scenario:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engines", type=int, default=8)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=48, help="requests open at once")
    parser.add_argument(
        "--fault-every", type=float, default=4.0, help="seconds between faults, on average"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    return Scenario(
        options.engines, options.requests, options.workers, options.fault_every, options.seed
    )


def main() -> int:
    scenario = _parse()
    return run_and_judge(lambda: run(scenario))


if __name__ == "__main__":
    sys.exit(main())
