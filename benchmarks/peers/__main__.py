"""How do Headway and other routers do in front of the same engines?

    python -m benchmarks.peers

First eight emulated H100s, then two vLLM engines with the bundled model; `--emulated` or `--real`
measures one of the two.

All systems are up side by side. One at a time gets load, the same requests at the same times, in
an order that each repeat shuffles. Engines, routers and load generator share the machine's cores,
so a run in which the load generator itself was late is repeated, whichever system it was of.
"""

import argparse
import contextlib
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from typing import Any

import msgspec

from benchmarks.load.capacity import NUM_WORKERS, measured_capacity
from benchmarks.load.mix import Mix
from benchmarks.peers import PEERS
from benchmarks.peers.fleet import EmulatedFleet, VllmFleet
from benchmarks.peers.peer import MissingError
from benchmarks.peers.testbed import BUSY_ROUTER_CPU, MAX_OTHERS_CPU, MeasuredRun, Testbed
from benchmarks.report.latency import Latencies, Sample, finish_comparison
from benchmarks.report.report import Report, Spread
from benchmarks.report.runner import print_progress, run_to_the_end
from benchmarks.systems.real_engines import RealEngines
from benchmarks.systems.system import EmulatedHeadway
from router.simulation.variant import OURS
from serving.capacity.launch import MeasureError
from serving.capacity.service import Service, SystemUnderTest
from serving.planning.bundled_model import SERVED_MODEL_NAME

# A disturbed run is tried so many times in all. The last one counts, disturbed or not: the router
# itself may take the processor from the load generator.
_MAX_TRIES = 2
_LOAD = 0.75  # share of what two real engines carry, unless a rate is given
_CALIBRATION_S = 30.0
# Sizes that keep 8 emulated H100s busy at a rate that two cores can carry. By the engine model
# alone, each H100 carries 12.5 such requests/s.
_EMULATED_MIX = Mix(short_tokens=(100, 800), long_tokens=(6000, 16_000), output_tokens=(16, 64))


@dataclass(frozen=True)
class Scenario:
    """What one run of the benchmark does."""

    peers: tuple[str, ...]
    profile: str | None  # None: real engines
    num_engines: int
    rate: float | None  # requests per second; unset: a share of what real engines carry
    duration_s: float
    num_repeats: int
    seed: int
    one_policy: bool  # only the first of each peer

    @property
    def max_late_s(self) -> float:
        """The lateness of the load generator (p99) above which a run counts as disturbed.

        Steps take some 25 ms on emulated engines, and hundreds on real ones, on CPU cores that
        they share with the load generator.
        """
        return 0.02 if self.profile else 0.1

    @property
    def timeout_s(self) -> float:
        """Seconds after the last arrival: many times what a request takes if nothing is wrong."""
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

    def make_systems(self) -> tuple[EmulatedFleet | VllmFleet, Service]:
        """Return the engines behind the peers, and Headway with its own."""
        if self.profile is None:
            return VllmFleet(self.num_engines), RealEngines(self.num_engines)
        settings = self.profile, self.num_engines, self.model
        return EmulatedFleet(*settings), EmulatedHeadway(*settings)


async def run(scenario: Scenario) -> tuple[Report, list[Sample]]:
    """Run the scenario. Return the report and every request's sample."""
    config = {**asdict(scenario), "mix": asdict(scenario.mix)}
    if scenario.profile:
        report = Report("peers-emulated", "emulated", scenario.seed, config)
    else:
        report = Report("peers-real", "measured", scenario.seed, config)
    versions = report.config["peer_versions"] = _install_peers(scenario, report)
    runs: dict[str, list[MeasuredRun]] = defaultdict(list)
    repeated: Counter[str] = Counter()
    async with contextlib.AsyncExitStack() as stack:
        fleet, ours = scenario.make_systems()
        await stack.enter_async_context(fleet)
        print_progress(f"{scenario.num_engines} {fleet.name}: {scenario.profile or scenario.model}")
        systems: dict[str, SystemUnderTest] = {OURS: await stack.enter_async_context(ours)}
        for peer in PEERS:
            policies = peer.policies[:1] if scenario.one_policy else peer.policies
            for policy in policies if peer.title in versions else ():
                system = peer(policy, fleet.urls, scenario.model)
                try:
                    systems[system.name] = await stack.enter_async_context(system)
                except MeasureError as error:
                    print_progress(f"{system.name} is skipped: {error}")
                    report.add_note(f"{system.name} is skipped: it did not start.")
        print_progress(f"up: {', '.join(systems)}")
        rate = scenario.rate or await _choose_rate(scenario, ours)
        report.config["sent_requests_per_s"] = rate
        behind = {name: ours if name == OURS else fleet for name in systems}
        testbed = Testbed(systems, behind, scenario.timeout_s)
        for repeat in range(-1, scenario.num_repeats):  # the first warms everything up
            order = list(systems)
            random.Random(f"order {scenario.seed} {repeat}").shuffle(order)
            for name in order:
                duration_s = scenario.duration_s if repeat >= 0 else scenario.warm_up_s
                requests = scenario.mix.arrivals(rate, duration_s, f"{scenario.seed} {repeat}")
                for trial in range(_MAX_TRIES if repeat >= 0 else 1):
                    measured = await testbed.measure_run(
                        name,
                        requests,
                        scenario.mix,
                        scenario.model,
                        repeat,
                        f"{scenario.seed} {repeat} {name} {trial}",
                    )
                    if not measured.was_disturbed(scenario.max_late_s):
                        break
                if repeat >= 0:
                    runs[name].append(measured)
                    repeated[name] += trial
        num_late = fleet.num_late() if isinstance(fleet, EmulatedFleet) else 0
        state = await ours.state()
    samples = [sample for each in chain(*runs.values()) for sample in each.samples]
    latencies = Latencies(samples)
    latencies.fill(report)
    for name, counted in runs.items():
        report.add_row(
            "Turns that count, and what they cost",
            policy=name,
            taken_again=repeated[name],
            sent_late_p99_ms=Spread.of([1e3 * each.late_s for each in counted]),
            router_cpu_s=Spread.of([each.cost.router_s for each in counted]),
            engines_cpu_s=Spread.of([each.cost.engines_s for each in counted]),
            others_cpu_s=Spread.of([each.cost.others_s for each in counted]),
        )
    report.config["prediction_accuracy"] = msgspec.to_builtins(state.accuracy)
    rivals = [name for name in systems if name != OURS]
    latencies.set_targets(report, OURS, rivals)
    latencies.note_failures(report)
    for note in _notes(scenario, num_late):
        report.add_note(note)
    return report, samples


def _install_peers(scenario: Scenario, report: Report) -> dict[str, str]:
    """Install the peers. Return their versions; those that cannot be installed are skipped."""
    versions: dict[str, str] = {}
    for peer in PEERS:
        if peer.title in scenario.peers:
            try:
                print_progress(f"installing {peer.title}")
                versions[peer.title] = peer.install()
            except MissingError as error:
                print_progress(f"{peer.title} is skipped: {error}")
                report.add_note(f"{peer.title} is skipped: {error}.")
    return versions


async def _choose_rate(scenario: Scenario, ours: Service) -> float:
    """Measure what two real engines carry. Return the requests per second to send to them."""
    carried = await measured_capacity(
        ours, scenario.mix, scenario.model, scenario.seed, NUM_WORKERS, _CALIBRATION_S
    )
    await ours.switch(OURS)
    print_progress(f"two engines carry {carried:.2f} requests/s; sending {_LOAD:.0%} of that")
    return _LOAD * carried


def _notes(scenario: Scenario, num_late: int) -> Iterator[str]:
    """Yield what a reader must know to judge the figures."""
    if scenario.profile:
        yield (
            "Engines are emulated: vLLM's scheduler in real time at a profile's step times, and "
            "no model."
        )
    yield (
        "All engines have the same settings, the largest prefill chunk among them. TTFT targets "
        "as priorities and the cap on prefill inside an engine are a part of Headway; the peers' "
        "engines schedule as vLLM does, first come, first served."
    )
    yield (
        "Ray Serve LLM's own router is skipped: it starts vLLM engines of its own and cannot be "
        "put in front of these."
    )
    yield (
        f"A run is repeated, up to {_MAX_TRIES} times in all, if requests were sent more than "
        f"{1e3 * scenario.max_late_s:g} ms late (p99) while the router took less than "
        f"{BUSY_ROUTER_CPU:g} processors, or if other work kept {MAX_OTHERS_CPU:g} processors "
        "busy. The last one counts."
    )
    if num_late:
        yield f"{num_late} times an engine was late: this machine is too slow for this rate."


def _parse() -> list[Scenario]:
    titles = [peer.title for peer in PEERS]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--emulated", action="store_true", help="only in front of emulated H100s")
    parts.add_argument("--real", action="store_true", help="only in front of real vLLM engines")
    parser.add_argument("--peers", nargs="+", choices=titles, default=titles, metavar="PEER")
    parser.add_argument("--profile", default="h100-llama8b", help="of the emulated engines")
    parser.add_argument("--engines", type=int, help="8 emulated, 2 real")
    parser.add_argument(
        "--rate", type=float, help="requests/s: 70, or 75 %% of what real ones carry"
    )
    parser.add_argument("--duration", type=float, help="of arrivals per run, s: 15, real 45")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one-policy", action="store_true", help="only the first of each peer")
    parser.add_argument("--seed", type=int, default=0)
    options: Any = parser.parse_args()
    return [
        Scenario(
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
    for scenario in _parse():
        finish_comparison(*run_to_the_end(partial(run, scenario)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
