"""Many emulated engines failing under load: `python -m benchmarks.chaos.emulated`.

The deployed gateway, its listener and the engines' stream servers run in one process;
faults hit random engines at random moments, several at a time. Every reply is
compared with that of an undisturbed run. The engines are vLLM's scheduler at a
profile's step times, without a model (`serving.engine.emulated.engine`).
"""

import argparse
import asyncio
import enum
import itertools
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import httpx

from benchmarks.chaos.checks import probe_faults, seam_gaps_s
from benchmarks.chaos.client import Question, Reply, ask
from benchmarks.policies.comparison import say
from benchmarks.report.report import Report, percentile
from benchmarks.report.runner import run_and_judge
from benchmarks.systems.faulty_engine import FaultyEngine, FaultyFleet
from router import Request
from serving.capacity.launch import MeasureError
from serving.capacity.service import free_ports
from serving.config import parse
from serving.engine.emulated.engine import EmulatedArgs, EmulatedEngine
from serving.gateway.app import Gateway
from serving.gateway.http.listener import Listener

_MODEL = "emulated"
_PROFILE = "h100-llama8b"
# Of every step: 8 engines with 48 streams make as many tokens as one process can pass on,
# read and compare beside them. A token takes about 33 ms.
_SLOWNESS = 5.0
_DETECT_S = 6.0
_SIZES = (20, 50, 120)  # tokens of an answer
_RESTART_S = (0.5, 3.0)  # how long a lost engine is away, from and to


class Fault(enum.Enum):
    """One way to fail."""

    RESET = "connections broken, engine lost"
    DEATH = "engine core dead: every stream says so"
    HANG = "no step for 7 s, snapshots go on"
    SILENCE = "no snapshot for 7 s, tokens go on"


_PAUSE_S = 7.0


@dataclass(frozen=True)
class Plan:
    """What is done."""

    num_engines: int
    num_requests: int
    num_workers: int
    fault_every_s: float  # on average
    seed: int


class Fleet:
    """One run."""

    def __init__(self, plan: Plan, gateway: Gateway, http: httpx.AsyncClient) -> None:
        self.plan = plan
        self.gateway = gateway
        self.replies: list[Reply] = []
        self.faults: list[tuple[float, Fault]] = []
        self.texts: dict[int, str] = {}
        self.resume_delays_s: list[float] = []
        self._http = http
        self._rng = random.Random(f"fleet {plan.seed}")
        self._num_left = plan.num_requests
        engines = [FaultyEngine(_engine(rank)) for rank in range(plan.num_engines)]
        self.fleet = FaultyFleet(engines, gateway.driver.engines.set_members)
        self._failing: set[FaultyEngine] = set()
        self._observe_resume = gateway.metrics.observe_resume
        gateway.metrics.observe_resume = self._resumed  # type: ignore[method-assign]

    def _resumed(self, request: Request, delay_s: float) -> None:
        """Every value of `headway_resume_delay_seconds`, which itself keeps only buckets."""
        self.resume_delays_s.append(delay_s)
        self._observe_resume(request, delay_s)

    async def run(self) -> None:
        """Undisturbed replies first, then load and faults."""
        for engine in self.fleet.engines:
            await self.fleet.open(engine)
        while len(self.gateway.driver.engines.infos) < self.plan.num_engines:
            await asyncio.sleep(0.05)
        for size in _SIZES:
            reply = await self._ask(size)
            if reply.error:
                raise MeasureError(f"an undisturbed reply failed: {reply.error}")
            self.texts[size] = reply.text
        async with asyncio.TaskGroup() as tasks:
            faults = tasks.create_task(self._disturb(tasks))
            workers = [tasks.create_task(self._work(n)) for n in range(self.plan.num_workers)]
            await asyncio.gather(*workers)
            faults.cancel()

    async def _ask(self, num_tokens: int) -> Reply:
        return await ask(self._http, _MODEL, Question("Count.", num_tokens))

    async def _work(self, number: int) -> None:
        rng = random.Random(f"worker {self.plan.seed} {number}")
        while self._num_left > 0:
            self._num_left -= 1
            self.replies.append(await self._ask(rng.choice(_SIZES)))
            if len(self.replies) % 1000 == 0:
                say(f"{len(self.replies)} replies, {len(self.faults)} faults")

    async def _disturb(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            await asyncio.sleep(self._rng.expovariate(1.0 / self.plan.fault_every_s))
            well = [engine for engine in self.fleet.engines if engine not in self._failing]
            if well:
                tasks.create_task(
                    self._inflict(self._rng.choice(well), self._rng.choice(list(Fault)))
                )

    async def _inflict(self, engine: FaultyEngine, fault: Fault) -> None:
        self._failing.add(engine)
        self.faults.append((time.monotonic(), fault))
        if fault in (Fault.RESET, Fault.DEATH):
            if fault is Fault.DEATH:
                engine.dead = True
                await asyncio.sleep(0.25)  # until its process has left
            self.fleet.close(engine)
            await asyncio.sleep(self._rng.uniform(*_RESTART_S))
            engine.go_on()
            await self.fleet.open(engine)
        else:
            if fault is Fault.HANG:
                engine.hang()
            else:
                engine.is_silent = True
            await asyncio.sleep(_PAUSE_S)
            engine.go_on()
        self._failing.discard(engine)

    def report(self, report: Report) -> None:
        """Judge what came back."""
        state = self.gateway.state()
        failed = Counter(reply.error for reply in self.replies if reply.error)
        whole = [reply for reply in self.replies if not reply.error]
        different = [
            reply
            for reply in whole
            if reply.text != self.texts[reply.question.num_tokens]
            or len(reply.response_ids) != 1
            or len(reply.dates) != 1
            or [usage["completion_tokens"] for usage in reply.usages] != [reply.question.num_tokens]
        ]
        kinds = Counter(fault for _, fault in self.faults)
        for fault in Fault:
            report.row("faults", fault=fault.value, times=kinds[fault])
        report.row(
            "replies",
            sent=len(self.replies),
            failed=failed.total(),
            different=len(different),
            retries_and_resumptions=state.retries.num_made,
        )
        gaps_s = seam_gaps_s(whole, [at_s for at_s, _ in self.faults], _DETECT_S)
        for what, values_s in (
            ("for the client, beyond its usual pause", gaps_s),
            ("from the failure's notice to the next byte", self.resume_delays_s),
        ):
            if values_s:
                report.row(
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
        report.row(
            "between two chunks, s",
            p50=percentile(usual_s, 50),
            p99=percentile(usual_s, 99),
        )
        _, wrong_probes = probe_faults(state.breaker_events)
        num_open = state.num_open_requests + state.num_placed + state.num_record_bytes
        num_booked = sum(replica.ledger.num_open for replica in state.replicas.values())
        report.target("streamed requests", len(self.replies), ">= 5000")
        report.target("failed requests", failed.total(), "== 0")
        report.target("replies that differ", len(different), "== 0")
        report.target("probes beyond one per half-open", len(wrong_probes), "== 0")
        report.target("requests and bookings left over", num_open + num_booked, "== 0")
        outcomes = {name: count for name, count in state.outcomes.items() if count}
        report.note(f"Outcomes as the gateway counts them: {outcomes}.")
        report.note(
            "For the client: the longest pause in a reply that begins within "
            f"{_DETECT_S:g} s of a fault, less the reply's median pause; only pauses of five times "
            "that. Of a hang or a silence most of it is the time until it is noticed "
            "(router.hang_s, router.stale_s)."
        )
        report.note(
            "A request under which four engines in a row have failed, and whose reply got no "
            "further meanwhile (router.max_attempts), is given up."
        )
        report.note(
            f"Emulated engines, every step {_SLOWNESS:g} times as long as the profile says, in one "
            "process with gateway and clients."
        )
        for error, count in failed.items():
            report.note(f"Failed {count} times: {error}")


def _engine(rank: int) -> EmulatedEngine:
    engine = EmulatedEngine(EmulatedArgs(profile=_PROFILE), _MODEL, rank)
    engine.model.slowness = _SLOWNESS
    return engine


async def run(plan: Plan) -> Report:
    """Carry out the plan."""
    (port,) = free_ports(1)
    gateway = Gateway(parse({"gateway": {"port": port}}), "gateway")
    listener = Listener(gateway.app, gateway.config.gateway)
    await listener.start()
    config = asdict(plan) | {"profile": _PROFILE, "slowness": _SLOWNESS}
    report = Report("chaos-fleet", "emulated", plan.seed, config)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=limits) as http:
        fleet = Fleet(plan, gateway, http)
        started_s = time.monotonic()
        await fleet.run()
        say(f"{len(fleet.replies)} replies in {time.monotonic() - started_s:.0f} s")
        fleet.report(report)
    gateway.close()
    await listener.stop()
    return report


def _parse(arguments: Sequence[str] | None) -> Plan:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engines", type=int, default=8)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=48, help="requests open at any time")
    parser.add_argument("--fault-every", type=float, default=4.0, help="on average, s")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    return Plan(
        options.engines, options.requests, options.workers, options.fault_every, options.seed
    )


def main() -> int:
    plan = _parse(None)
    return run_and_judge(lambda: run(plan))


if __name__ == "__main__":
    sys.exit(main())
