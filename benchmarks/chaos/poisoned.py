"""Does one request hurt another? Emulated engines, and a client that sends every known poison.

    python -m benchmarks.chaos.poisoned

The deployed gateway, its listener and the engines' stream servers run in one process, as in
`benchmarks.chaos.emulated`. Beside a load of good requests one client sends each poison three
times, as clients that retry do. Every good reply is compared with that of an undisturbed run.
"""

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass

import httpx

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
from benchmarks.systems.faulty_engine import FaultyFleet
from benchmarks.systems.poisoned_engine import Poison, PoisonedEngine
from router.resilience.breaker import TripReason
from serving.capacity.launch import MeasureError
from serving.gateway.app import Gateway

_SIZES = (20, 50, 120)  # tokens of a reply
_PROMPTS = tuple(f"Count from {number}." for number in range(5))
_COPIES = 3
_EXIT_S = 0.25  # from an engine core's death to its process's exit
_HANG_TIMEOUT_S = 7.0  # then its process exits; shorter than by default, to save time
_RESTART_S = 3.0


@dataclass(frozen=True)
class Scenario:
    """What one run does."""

    num_engines: int
    num_workers: int
    seed: int


class PoisonRun:
    """One run: good load, poison, and what came of both."""

    def __init__(self, scenario: Scenario, gateway: Gateway, http: httpx.AsyncClient) -> None:
        self.scenario = scenario
        self.gateway = gateway
        self.replies: list[Reply] = []
        self.waits_s: list[float] = []  # of good requests, to their first token
        self.texts: dict[tuple[str, int], str] = {}  # undisturbed
        self.num_lost: Counter[Poison] = Counter()  # engines
        self._is_over = False
        self.answers: dict[Poison, list[str]] = {}  # what the poisoner was told, each time
        self._http = http
        self._restarts: set[asyncio.Task[None]] = set()
        engines = [
            PoisonedEngine(make_engine(rank), self._lose) for rank in range(scenario.num_engines)
        ]
        self.fleet = FaultyFleet(engines, gateway.driver.engines.set_members)

    async def run(self) -> None:
        """Read undisturbed replies, then send load and poison."""
        await add_engines(self.fleet, self.gateway)
        for prompt in _PROMPTS:
            for size in _SIZES:
                reply = await send_question(self._http, MODEL, Question(prompt, size))
                if reply.error:
                    raise MeasureError(f"an undisturbed reply failed: {reply.error}")
                self.texts[prompt, size] = reply.text
        async with asyncio.TaskGroup() as tasks:
            for number in range(self.scenario.num_workers):
                tasks.create_task(self._send_good(number))
            for poison in Poison:
                await self._send_poison(poison)
            self._is_over = True
        await asyncio.gather(*self._restarts)

    async def _send_good(self, number: int) -> None:
        rng = random.Random(f"worker {self.scenario.seed} {number}")
        count = 0
        while not self._is_over:
            count += 1
            question = Question(rng.choice(_PROMPTS), rng.choice(_SIZES), user=f"{number} {count}")
            sent_s = time.monotonic()
            reply = await send_question(self._http, MODEL, question)
            self.replies.append(reply)
            if reply.times_s:
                self.waits_s.append(reply.times_s[0] - sent_s)

    async def _send_poison(self, poison: Poison) -> None:
        question = Question("Count.", 12, user=poison.name)
        self.answers[poison] = []
        for _ in range(_COPIES):
            reply = await send_question(self._http, MODEL, question)
            self.answers[poison].append(reply.error or "answered")
        print_progress(f"{poison.name}: {self.num_lost[poison]} engines, {self.answers[poison]}")

    def _lose(self, engine: PoisonedEngine, poison: Poison) -> None:
        """Have an engine's process exit for what a poison did to it, and start again."""
        self.num_lost[poison] += 1
        is_hung = poison in (Poison.HANGS, Poison.HANGS_AT_TOKEN)
        engine.dead = not is_hung
        task = asyncio.get_running_loop().create_task(
            self._restart(engine, _HANG_TIMEOUT_S if is_hung else _EXIT_S)
        )
        self._restarts.add(task)
        task.add_done_callback(self._restarts.discard)

    async def _restart(self, engine: PoisonedEngine, exit_s: float) -> None:
        await asyncio.sleep(exit_s)
        await self.fleet.remove_engine(engine)
        await asyncio.sleep(_RESTART_S)
        engine.recover()
        await self.fleet.add_engine(engine)

    def fill_report(self, report: Report) -> None:
        """Judge the replies; add figures and targets."""
        failed = Counter(reply.error for reply in self.replies if reply.error)
        different = [
            reply
            for reply in self.replies
            if not reply.error
            and (
                reply.text != self.texts[reply.question.text, reply.question.num_tokens]
                or len(reply.response_ids) != 1
            )
        ]
        for poison in Poison:
            report.add_row(
                "poison",
                poison=poison.value,
                engines_lost=self.num_lost[poison],
                last_answer=self.answers[poison][-1][:100],
            )
        report.add_row(
            "good requests",
            sent=len(self.replies),
            failed=failed.total(),
            different=len(different),
            first_token_p50_s=percentile(self.waits_s, 50),
            first_token_p99_s=percentile(self.waits_s, 99),
            slowest_s=max(self.waits_s),
        )
        state = self.gateway.state()
        earned = {TripReason.LOST.value, TripReason.HUNG.value, TripReason.STALE.value}
        opened = [event for event in state.breaker_events if event.event == "open"]
        unearned = [event for event in opened if event.reason not in earned]
        told = [
            poison
            for poison in Poison
            if poison.is_deadly and "ends_engines" not in self.answers[poison][-1]
        ]
        report.add_target("good requests failed", failed.total(), "== 0")
        report.add_target("good replies that differ", len(different), "== 0")
        report.add_target("engines lost to one body, most", max(self.num_lost.values()), "<= 2")
        num_for_nothing = sum(
            count for poison, count in self.num_lost.items() if not poison.is_deadly
        )
        report.add_target("engines lost to what is not deadly", num_for_nothing, "== 0")
        report.add_target("breakers opened for a poisoner's failures", len(unearned), "== 0")
        report.add_target("deadly bodies not refused at last", len(told), "== 0")
        report_leftovers(report, state)
        report.add_note(
            f"Each poison was sent {_COPIES} times, one after the other. An engine that ends "
            f"starts again after {_RESTART_S:g} s, one that hangs after {_HANG_TIMEOUT_S:g} s more."
        )
        note_engines(report)
        for event in unearned:
            report.add_note(f"Breaker {event.breaker} opened: {event.reason}")
        for error, count in failed.items():
            report.add_note(f"Failed {count} times: {error}")


async def run(scenario: Scenario) -> Report:
    """Run the scenario; return the report."""
    config = asdict(scenario) | config_of_engines()
    report = Report("chaos-poison", "emulated", scenario.seed, config)
    async with open_gateway() as (gateway, http):
        poisoned = PoisonRun(scenario, gateway, http)
        await poisoned.run()
        poisoned.fill_report(report)
    return report


def _parse() -> Scenario:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engines", type=int, default=6)
    parser.add_argument("--workers", type=int, default=24, help="good requests open at once")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    return Scenario(options.engines, options.workers, options.seed)


def main() -> int:
    scenario = _parse()
    return run_and_judge(lambda: run(scenario))


if __name__ == "__main__":
    sys.exit(main())
