"""Five times more than the engines carry, for ten minutes: `python -m benchmarks.overload`.

The deployed gateway on Ray Serve in front of emulated engines, which take the time of
vLLM's scheduler on a GPU but hardly any of ours, so that what is short is the engines and
neither the gateway nor the load generator. First the capacity is measured, then what is
answered as promised at that rate (goodput), then the same at a multiple of it; after that
the usual load again, and at last ten thousand connections that give nothing.
"""

import argparse
import asyncio
import itertools
import resource
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.load.capacity import measured_capacity
from benchmarks.load.hostile_clients import Crowd
from benchmarks.load.mix import Mix
from benchmarks.load.returning_clients import ReturningClients, Visit
from benchmarks.overload.watch import Watch
from benchmarks.peers.fleet import EmulatedHeadway
from benchmarks.policies.comparison import say
from benchmarks.report.plot_overload import plot_watch
from benchmarks.report.report import RESULTS, Report, percentile
from benchmarks.report.runner import run_to_the_end
from benchmarks.systems.processes import ResourceUsage, machine_busy_s
from router.simulation.figures import Slo, brief
from router.simulation.variant import OURS
from serving.capacity.client import Client

_MODEL = "emulated"
_PROFILE = "h100-llama8b"
# A step of 2,048 tokens takes an H100 42 ms: less than the promised time per token.
_STEP_TOKENS = 2048
_MIX = Mix(short_tokens=(200, 1000), long_tokens=(3000, 6000), output_tokens=(16, 64))
_WORKERS_PER_ENGINE = 48  # enough that an engine always has a full step
_PAUSE_S = 3.0
_COME_BACK_EVERY = 20
_HEAD_TIMEOUT_S = _BODY_TIMEOUT_S = 20.0
_MAX_HELD_BYTES = 64 * 2**20
_MAX_RECORD_BYTES = 16 * 2**20
_MAX_INCOMING_BYTES = 64 * 2**20
_HALF_BODY_BYTES = 1_000_000
_BOMB_BYTES = 1_000_000


@dataclass(frozen=True)
class Plan:
    """What is run."""

    num_engines: int
    times_capacity: float
    capacity_s: float
    usual_s: float
    overload_s: float
    num_idle: int
    num_half_sent: int
    num_bombs: int
    seed: int


class Deployment(EmulatedHeadway):
    """Headway with emulated engines, and bounds small enough to be reached."""

    def config(self, port: int, gateway_port: int) -> dict[str, Any]:
        """Return the content of the config file."""
        config = super().config(port, gateway_port)
        args = config["applications"][0]["args"]
        args["engine"]["args"]["max_num_batched_tokens"] = _STEP_TOKENS
        args["router"] = {"max_held_bytes": _MAX_HELD_BYTES}
        args["gateway"] |= {
            "max_record_bytes": _MAX_RECORD_BYTES,
            "max_incoming_bytes": _MAX_INCOMING_BYTES,
            "head_timeout_s": _HEAD_TIMEOUT_S,
            "body_timeout_s": _BODY_TIMEOUT_S,
        }
        return config


class Run:
    """One run, phase by phase."""

    def __init__(self, plan: Plan, deployment: Deployment, watch: Watch, report: Report) -> None:
        self.plan = plan
        self.deployment = deployment
        self.watch = watch
        self.report = report
        self.slo = Slo()
        self.goodputs: dict[str, float] = {}
        self.share_beside_crowd = 0.0  # of requests that got what was promised

    async def capacity(self) -> float:
        """Return the requests per second that the engines carry, all of them always full."""
        self.watch.phase = "capacity"
        num_workers = _WORKERS_PER_ENGINE * self.plan.num_engines
        # By ours, for it is what ours carries that is exceeded: other policies fill engines more,
        # for they do not keep to the time per token.
        seed, window_s = self.plan.seed, self.plan.capacity_s
        rate = await measured_capacity(
            self.deployment, _MIX, _MODEL, seed, num_workers, window_s, OURS
        )
        say(f"capacity: {brief(rate)} requests/s")
        return rate

    async def load(
        self, name: str, rate: float, duration_s: float, come_back_every: int = 0
    ) -> list[Visit]:
        """One phase of load; what is answered after its end belongs to it."""
        self.watch.phase = name
        visitors_seed = f"{self.plan.seed} {name}"
        cpu_before, busy_before = self._cpu_s(), machine_busy_s()
        start_s = time.perf_counter()
        async with Client(self.deployment.urls) as client:
            visitors = ReturningClients(client, _MIX, _MODEL, visitors_seed, come_back_every)
            await visitors.come(rate, duration_s)
            elapsed_s = time.perf_counter() - start_s
            cpu_s = {role: used_s - cpu_before[role] for role, used_s in self._cpu_s().items()}
            busy_s = machine_busy_s() - busy_before
            self.watch.phase = f"after {name}"
            await visitors.leave()
        visits = visitors.visits
        self._tell(name, rate, elapsed_s, visits)
        self.report.row(
            "cores in use",
            phase=name,
            **{role: used / elapsed_s for role, used in sorted(cpu_s.items())},
            whole_machine=busy_s / elapsed_s,
        )
        await asyncio.sleep(_PAUSE_S)
        return visits

    def _tell(self, name: str, rate: float, elapsed_s: float, visits: list[Visit]) -> None:
        done = [visit for visit in visits if visit.record.completed]
        ttft_s = [visit.ttft_s for visit in done] or [float("nan")]
        tpot_s = [visit.tpot_s for visit in done] or [float("nan")]
        goodput = sum(visit.met(self.slo) for visit in visits) / elapsed_s
        self.goodputs[name] = goodput
        refused = [visit for visit in visits if visit.is_refused]
        self.report.row(
            "load",
            phase=name,
            asked_for_per_s=rate,
            goodput_per_s=goodput,
            completed_per_s=len(done) / elapsed_s,
            refused_share=len(refused) / len(visits),
            otherwise_failed=len(visits) - len(done) - len(refused),
            kept_promise_of_completed=sum(visit.met(self.slo) for visit in done)
            / max(1, len(done)),
            ttft_p50_s=percentile(ttft_s, 50),
            ttft_p99_s=percentile(ttft_s, 99),
            tpot_p50_s=percentile(tpot_s, 50),
            tpot_p99_s=percentile(tpot_s, 99),
            generator_late_p99_s=percentile([visit.record.late_s for visit in visits], 99),
        )
        say(f"{name}: goodput {brief(goodput)}/s, {len(refused)} of {len(visits)} refused")
        for error, count in Counter(
            visit.record.error for visit in visits if visit.record.error and not visit.is_refused
        ).most_common(5):
            self.report.note(f"{name}: {count} requests failed: {error}")

    def by_minute(self, visits: list[Visit]) -> None:
        """How goodput goes over the minutes of the overload."""
        start_s = visits[0].record.due_s
        first = [visit for visit in visits if not visit.is_return]
        for minute, group in itertools.groupby(
            first, key=lambda visit: int((visit.record.due_s - start_s) // 60)
        ):
            members = list(group)
            span_s = min(60.0, self.plan.overload_s - 60.0 * minute)
            self.report.row(
                "minutes of overload",
                minute=minute + 1,
                goodput_per_s=sum(visit.met(self.slo) for visit in members) / span_s,
                refused_share=sum(visit.is_refused for visit in members) / len(members),
            )

    def returns(self, visits: list[Visit], end_s: float) -> None:
        """What became of those who came back when they were told to."""
        for when, chosen in (
            ("while the overload lasts", lambda due_s: due_s <= end_s),
            ("after its end", lambda due_s: due_s > end_s),
        ):
            members = [v for v in visits if v.is_return and chosen(v.record.due_s)]
            if members:
                self.report.row(
                    "who came back by Retry-After",
                    when=when,
                    requests=len(members),
                    let_in_share=sum(not v.is_refused for v in members) / len(members),
                    kept_promise_share=sum(v.met(self.slo) for v in members) / len(members),
                )
        waits_s = [v.record.retry_after_s for v in visits if v.record.retry_after_s is not None]
        if waits_s:
            self.report.row(
                "Retry-After, s",
                replies=len(waits_s),
                least=min(waits_s),
                p50=percentile(waits_s, 50),
                p99=percentile(waits_s, 99),
                most=max(waits_s),
            )

    async def crowd(self, rate: float) -> Crowd:
        """Ten thousand connections that give nothing, and half the usual load beside them."""
        self.watch.phase = "connecting"
        host, port = self.deployment.urls[0].removeprefix("http://").split(":")
        crowd = Crowd(host, int(port))
        plan = self.plan
        try:
            await crowd.half_sent(plan.num_half_sent, _HALF_BODY_BYTES)
            await crowd.header_bombs(plan.num_bombs, _BOMB_BYTES)
            await crowd.idle(plan.num_idle)
            say(f"open: {dict(crowd.open)}; not connected: {dict(crowd.not_connected)}")
            num_open = crowd.open["idle"]
            visits = await self.load("beside the crowd", 0.5 * rate, 10.0)
            self.share_beside_crowd = sum(visit.met(self.slo) for visit in visits) / len(visits)
            self.watch.phase = "crowd"
            await crowd.until_cut(3 * _HEAD_TIMEOUT_S)
        finally:
            num_left = crowd.open.total()
            crowd.leave()
        self.report.row(
            "connections that give nothing",
            idle_at_the_same_time=num_open,
            **{
                f"{kind.replace(' ', '_').replace('-', '_')}_cut": count
                for kind, count in crowd.cut.items()
            },
            longest_until_cut_s=max(crowd.cut_after_s.values(), default=None),
            left=num_left,
        )
        bombs = {status: n for (kind, status), n in crowd.answers.items() if kind == "header bomb"}
        bodies = {s: n for (kind, s), n in crowd.answers.items() if kind == "half-sent body"}
        self.report.note(f"Answers to header bombs: {bombs}; to half-sent bodies: {bodies}.")
        return crowd

    def _cpu_s(self) -> defaultdict[str, float]:
        self.watch.usage.refresh()
        used = self.watch.usage.cpu_s()
        used["load generator"] = time.process_time()
        return used


async def run(plan: Plan) -> tuple[Report, Watch, float]:
    """Carry out the plan; return the report, the looks and the gateway's bound, MB."""
    config = asdict(plan) | {
        "profile": _PROFILE,
        "max_num_batched_tokens": _STEP_TOKENS,
        "mix": asdict(_MIX),
        "promise": str(Slo()),
        "max_held_bytes": _MAX_HELD_BYTES,
        "max_record_bytes": _MAX_RECORD_BYTES,
        "max_incoming_bytes": _MAX_INCOMING_BYTES,
        "head_timeout_s": _HEAD_TIMEOUT_S,
        "body_timeout_s": _BODY_TIMEOUT_S,
    }
    report = Report("overload", "emulated", plan.seed, config)
    async with Deployment(_PROFILE, plan.num_engines, _MODEL) as deployment:
        watch = Watch(ResourceUsage(deployment.launches[0]), deployment.find_state)
        async with watch.running():
            await asyncio.sleep(_PAUSE_S)
            one = Run(plan, deployment, watch, report)
            rate = await one.capacity()
            report.row("capacity", requests_per_s=rate)
            await asyncio.sleep(_PAUSE_S)
            await one.load("1x", rate, plan.usual_s)
            base_mb = max(look.gateway_mb for look in watch.looks)
            name = f"{plan.times_capacity:g}x"
            start_s = time.perf_counter()
            visits = await one.load(
                name, plan.times_capacity * rate, plan.overload_s, _COME_BACK_EVERY
            )
            one.by_minute(visits)
            one.returns(visits, start_s + plan.overload_s)
            await one.load("afterwards 1x", rate, plan.usual_s / 2)
            crowd = await one.crowd(rate)
            watch.phase = "end"
            await asyncio.sleep(_PAUSE_S)
            last = await watch.look()
            state = await asyncio.to_thread(deployment.find_state)
    bounds_bytes = _MAX_HELD_BYTES + _MAX_RECORD_BYTES + _MAX_INCOMING_BYTES
    bound_mb = base_mb + bounds_bytes / 1e6
    _memory(report, watch, name)
    refused = [visit for visit in visits if visit.record.status not in (0, 200)]
    overload_looks = watch.during(name)
    for title, phase in ((f"at {name}", name), ("at 1x afterwards", "afterwards 1x")):
        usual = one.goodputs["1x"]
        share = one.goodputs[phase] / usual if usual else None
        report.target(f"goodput {title}, of that at 1x", share, ">= 0.9")
    wrong = [v for v in refused if not v.is_refused or v.record.retry_after_s is None]
    report.target("refusals other than 429 with Retry-After", len(wrong), "== 0")
    num_lost = sum(v.record.status == 0 or bool(v.record.error) for v in visits) - len(refused)
    report.target("requests lost in the overload", num_lost, "== 0")
    report.target(
        "looks at the overload with an open breaker",
        sum(bool(look.num_open_breakers) for look in overload_looks),
        "== 0",
    )
    gateway_mb = max(look.gateway_mb for look in watch.looks)
    report.target("gateway's memory at most, of its bound", gateway_mb / bound_mb, "<= 1")
    report.target("idle connections at the same time", crowd.cut["idle"], f">= {plan.num_idle}")
    report.target("promises kept beside them", one.share_beside_crowd, ">= 0.95")
    num_left = None
    if state is not None:
        num_booked = sum(each.ledger.num_open for each in state.replicas.values())
        num_left = last.num_held + last.num_placed + state.num_record_bytes + num_booked
    report.target("requests, records and bookings left over", num_left, "== 0")
    report.note(
        "Capacity: requests per second served while every engine always has a full step (closed "
        "loop). Goodput: requests per second that got their first token by the router's promise "
        f"and their tokens at its pace ({Slo()}), counted from when each was due."
    )
    report.note(
        f"Bound of the gateway's memory: its most before the overload ({base_mb:.0f} MB), and what "
        "may be held, recorded and received on top (max_held_bytes, max_record_bytes, "
        "max_incoming_bytes)."
    )
    report.note(
        f"Of those refused one in {_COME_BACK_EVERY} comes back once, when it was told to; these "
        "count as asked for on top."
    )
    report.note("Engines are emulated: vLLM's scheduler at a profile's step times, no model.")
    return report, watch, bound_mb


def _memory(report: Report, watch: Watch, name: str) -> None:
    """The gateway's and engines' memory by phase."""
    for phase in dict.fromkeys(look.phase for look in watch.looks):
        looks = watch.during(phase)
        report.row(
            "resident memory, MB",
            phase=phase,
            gateway_first=looks[0].gateway_mb,
            gateway_most=max(look.gateway_mb for look in looks),
            gateway_last=looks[-1].gateway_mb,
            engines_most=max(look.engines_mb for look in looks),
            held_most=max(look.num_held for look in looks),
            held_most_mb=max(look.held_mb for look in looks),
            record_most_mb=max(look.record_mb for look in looks),
        )


def _parse(arguments: Sequence[str] | None) -> Plan:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--times", type=float, default=5.0, help="the capacity")
    parser.add_argument("--capacity", type=float, default=15.0, help="measured for so long, s")
    parser.add_argument("--usual", type=float, default=60.0, help="load at 1x for so long, s")
    parser.add_argument("--duration", type=float, default=600.0, help="of the overload, s")
    parser.add_argument("--idle", type=int, default=10_000, help="connections that say nothing")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    return Plan(
        options.engines,
        options.times,
        options.capacity,
        options.usual,
        options.duration,
        options.idle,
        num_half_sent=100,
        num_bombs=50,
        seed=options.seed,
    )


def main() -> int:
    plan = _parse(None)
    # Ten thousand clients are as many sockets here and in what we start.
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    report, watch, bound_mb = run_to_the_end(lambda: run(plan))
    report.finish()
    lines = RESULTS / "overload.csv"
    watch.write(lines)
    say(f"Every look: {lines.name}; figure: {plot_watch(lines, bound_mb).name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
