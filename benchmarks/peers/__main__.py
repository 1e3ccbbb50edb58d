"""Headway and other routers in front of the same engines: `python -m benchmarks.peers`.

First eight emulated H100s, then two vLLM engines with the bundled model;
`--emulated` or `--real` takes one of the two.

All run side by side and idle until it is their turn, in an order that is
shuffled anew per repeat; each gets the same requests at the same times.
Engines, routers and load generator share the machine's cores. So a turn in
which the load generator itself was late is taken again, whoever's turn it was.
"""

import argparse
import contextlib
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import msgspec

from benchmarks.load.capacity import measured_capacity
from benchmarks.load.mix import Mix
from benchmarks.peers import PEERS
from benchmarks.peers.fleet import EmulatedFleet, EmulatedHeadway, VllmFleet
from benchmarks.peers.peer import MissingError
from benchmarks.peers.turn import BUSY_ROUTER_CPU, MAX_OTHERS_CPU, Stage, Turn
from benchmarks.policies.comparison import NUM_WORKERS, finish, say
from benchmarks.report.latency import Latencies, Sample
from benchmarks.report.report import Report, Spread
from benchmarks.report.runner import run_to_the_end
from benchmarks.systems.real_engines import RealEngines
from router.simulation.variant import OURS
from serving.capacity.launch import MeasureError
from serving.capacity.service import Service, SystemUnderTest
from serving.planning.bundled_model import SERVED_MODEL_NAME

# How often a turn is taken that was disturbed: the last one counts, whatever it was, for a
# router may itself be what takes the processor from the generator.
_MAX_TURNS = 2
_LOAD = 0.75  # of what two real engines carry, unless a rate is asked for
_CALIBRATION_S = 30.0
# Sizes that keep 8 emulated H100s busy at a rate that two cores can carry: by the model
# alone, each carries 12.5 requests/s of them.
_EMULATED_MIX = Mix(short_tokens=(100, 800), long_tokens=(6000, 16_000), output_tokens=(16, 64))


@dataclass(frozen=True)
class Plan:
    """What is run."""

    peers: tuple[str, ...]
    profile: str | None  # None: real engines
    num_engines: int
    rate: float | None  # requests per second; unset: by what real engines carry
    duration_s: float
    num_repeats: int
    seed: int
    one_policy: bool  # of each peer its first only

    @property
    def max_late_s(self) -> float:
        """Lateness of the generator (p99) from which a turn is disturbed.

        Steps of emulated engines take some 25 ms, those of real ones on CPU cores, which the
        generator shares with them, hundreds.
        """
        return 0.02 if self.profile else 0.1

    @property
    def timeout_s(self) -> float:
        """After the last arrival: many times what any request takes where nothing is wrong."""
        return 15.0 if self.profile else 120.0

    @property
    def warm_up_s(self) -> float:
        return 3.0 if self.profile else 10.0

    @property
    def mix(self) -> Mix:
        return Mix() if self.profile is None else _EMULATED_MIX

    @property
    def model(self) -> str:
        return SERVED_MODEL_NAME if self.profile is None else "emulated"

    def subjects(self) -> tuple[EmulatedFleet | VllmFleet, Service]:
        """The engines that the peers get, and Headway with its own."""
        if self.profile is None:
            return VllmFleet(self.num_engines), RealEngines(self.num_engines)
        settings = self.profile, self.num_engines, self.model
        return EmulatedFleet(*settings), EmulatedHeadway(*settings)


async def run(plan: Plan) -> tuple[Report, list[Sample]]:
    """Carry out the plan; return the report and every request's sample."""
    config = {**asdict(plan), "mix": asdict(plan.mix)}
    if plan.profile:
        report = Report("peers-emulated", "emulated", plan.seed, config)
    else:
        report = Report("peers-real", "measured", plan.seed, config)
    versions: dict[str, str] = {}
    for peer in PEERS:
        if peer.title in plan.peers:
            try:
                say(f"installing {peer.title}")
                versions[peer.title] = peer.install()
            except MissingError as error:
                say(f"{peer.title} is skipped: {error}")
                report.note(f"{peer.title} is skipped: {error}.")
    report.config["peer_versions"] = versions
    turns: dict[str, list[Turn]] = defaultdict(list)
    repeated: Counter[str] = Counter()
    async with contextlib.AsyncExitStack() as stack:
        fleet, ours = plan.subjects()
        await stack.enter_async_context(fleet)
        say(f"{plan.num_engines} {fleet.name}: {plan.profile or plan.model}")
        subjects: dict[str, SystemUnderTest] = {OURS: await stack.enter_async_context(ours)}
        for peer in PEERS:
            policies = peer.policies[:1] if plan.one_policy else peer.policies
            for policy in policies if peer.title in versions else ():
                subject = peer(policy, fleet.urls, plan.model)
                try:
                    subjects[subject.name] = await stack.enter_async_context(subject)
                except MeasureError as error:
                    say(f"{subject.name} is skipped: {error}")
                    report.note(f"{subject.name} is skipped: it did not start.")
        say(f"up: {', '.join(subjects)}")
        rate = plan.rate or await _rate(plan, ours)
        report.config["sent_requests_per_s"] = rate
        behind = {name: ours if name == OURS else fleet for name in subjects}
        stage = Stage(subjects, behind, plan.timeout_s)
        for repeat in range(-1, plan.num_repeats):  # the first warms everything up
            order = list(subjects)
            random.Random(f"order {plan.seed} {repeat}").shuffle(order)
            for name in order:
                duration_s = plan.duration_s if repeat >= 0 else plan.warm_up_s
                asks = plan.mix.arrivals(rate, duration_s, f"{plan.seed} {repeat}")
                for attempt in range(_MAX_TURNS if repeat >= 0 else 1):
                    turn = await stage.take_turn(
                        name,
                        asks,
                        plan.mix,
                        plan.model,
                        repeat,
                        f"{plan.seed} {repeat} {name} {attempt}",
                    )
                    if not turn.was_disturbed(plan.max_late_s):
                        break
                if repeat >= 0:
                    turns[name].append(turn)
                    repeated[name] += attempt
        num_late = fleet.num_late() if isinstance(fleet, EmulatedFleet) else 0
        state = await ours.state()
    samples = [sample for taken in turns.values() for turn in taken for sample in turn.samples]
    latencies = Latencies(samples)
    latencies.fill(report)
    for name, taken in turns.items():
        report.row(
            "Turns that count, and what they cost",
            policy=name,
            taken_again=repeated[name],
            sent_late_p99_ms=Spread.of([1e3 * turn.late_s for turn in taken]),
            router_cpu_s=Spread.of([turn.cost.router_s for turn in taken]),
            engines_cpu_s=Spread.of([turn.cost.engines_s for turn in taken]),
            others_cpu_s=Spread.of([turn.cost.others_s for turn in taken]),
        )
    report.config["prediction_accuracy"] = msgspec.to_builtins(state.accuracy)
    rivals = [name for name in subjects if name != OURS]
    latencies.set_targets(report, OURS, rivals)
    for (name, reason), count in Counter(
        (each.policy, each.error) for each in samples if each.error
    ).most_common(10):
        report.note(f"{name}: {count} requests failed: {reason}")
    for note in _notes(plan, num_late):
        report.note(note)
    return report, samples


async def _rate(plan: Plan, ours: Service) -> float:
    """What to send to real engines, requests per second."""
    carried = await measured_capacity(
        ours, plan.mix, plan.model, plan.seed, NUM_WORKERS, _CALIBRATION_S
    )
    await ours.switch(OURS)
    say(f"two engines carry {carried:.2f} requests/s; sending {_LOAD:.0%} of that")
    return _LOAD * carried


def _notes(plan: Plan, num_late: int) -> Iterator[str]:
    """What a reader must know."""
    if plan.profile:
        yield (
            "Engines are emulated: vLLM's scheduler in real time at a profile's step times, and "
            "no model."
        )
    yield (
        "All engines have the same settings, what one prompt may take of a step among them. "
        "Promises as priorities and paced steps inside an engine are a part of Headway; the "
        "peers' engines schedule as vLLM does, first come, first served."
    )
    yield (
        "Ray Serve LLM's own router is skipped: it starts vLLM engines of its own and cannot be "
        "put in front of these."
    )
    yield (
        f"A turn in which requests were sent more than {1e3 * plan.max_late_s:g} ms late (p99), "
        f"unless by a router that took more than {BUSY_ROUTER_CPU:g} processors itself, or in "
        f"which other work kept {MAX_OTHERS_CPU:g} processors busy, was taken again, up to "
        f"{_MAX_TURNS} times in all; the last one counts."
    )
    if num_late:
        yield f"{num_late} times an engine was late: this machine is too slow for the rate."


def _parse(arguments: Sequence[str] | None) -> list[Plan]:
    titles = [peer.title for peer in PEERS]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--emulated", action="store_true", help="only in front of emulated H100s")
    parts.add_argument("--real", action="store_true", help="only in front of real vLLM engines")
    parser.add_argument("--peers", nargs="+", choices=titles, default=titles, metavar="PEER")
    parser.add_argument("--profile", default="h100-llama8b", help="what is emulated")
    parser.add_argument("--engines", type=int, help="8 emulated, 2 real")
    parser.add_argument(
        "--rate", type=float, help="requests/s: 70, or 75 %% of what real ones carry"
    )
    parser.add_argument("--duration", type=float, help="of arrivals per turn, s: 15, real 45")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one-policy", action="store_true", help="of each peer its first only")
    parser.add_argument("--seed", type=int, default=0)
    options: Any = parser.parse_args(arguments)
    return [
        Plan(
            tuple(options.peers),
            None if is_real else options.profile,
            options.engines or (2 if is_real else 8),
            options.rate or (None if is_real else 70.0),
            options.duration or (45.0 if is_real else 15.0),
            options.repeats,
            options.seed,
            options.one_policy,
        )
        for is_real in (False, True)
        if not (options.emulated if is_real else options.real)
    ]


def main() -> int:
    for plan in _parse(None):
        finish(*run_to_the_end(partial(run, plan)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
