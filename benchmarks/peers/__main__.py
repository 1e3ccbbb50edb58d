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
import statistics
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.load.capacity import NUM_WORKERS, measured_capacity
from benchmarks.peers.data_parallel import VllmDataParallel
from benchmarks.peers.dilation import dilated_arrivals, undilated_sample
from benchmarks.peers.fleet import EmulatedFleet, VllmFleet
from benchmarks.peers.routers import PEERS
from benchmarks.peers.routers.haproxy import HAProxy
from benchmarks.peers.routers.peer import MissingError, Peer
from benchmarks.peers.scenario import Scenario
from benchmarks.peers.testbed import BUSY_ROUTER_CPU, MAX_OTHERS_CPU, MeasuredRun, Testbed
from benchmarks.report.latency import Latencies, Sample, finish_comparison
from benchmarks.report.report import Report, Spread
from benchmarks.report.runner import print_progress, run_to_the_end
from router.simulation.variant import OURS
from serving.capacity.launch import MeasureError
from serving.capacity.service import Service, SystemUnderTest

_ALL_PEERS: tuple[type[Peer], ...] = (*PEERS, VllmDataParallel)
_LOAD = 0.75  # share of what two real engines carry, unless a rate is given
_CALIBRATION_S = 30.0


async def run(scenario: Scenario) -> tuple[Report, list[Sample]]:
    """Run the scenario. Return the report and every request's sample."""
    config = {**asdict(scenario), "mix": asdict(scenario.mix)}
    kind: Any = "emulated" if scenario.profile else "measured"
    report = Report(scenario.name, kind, scenario.seed, config)
    versions = report.config["peer_versions"] = _install_peers(scenario, report)
    has_dp = VllmDataParallel.title in versions
    num_pairs = 1 + len(scenario.rival_engines) + has_dp
    runs: dict[str, list[MeasuredRun]] = defaultdict(list)
    repeated: Counter[str] = Counter()
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="headway-peers-")))
        num_sharing = num_pairs * scenario.num_engines
        fleets, ours = scenario.make_systems(folder, num_sharing)
        for fleet in fleets.values():
            await stack.enter_async_context(fleet)
            title = scenario.profile or scenario.model
            print_progress(f"{scenario.num_engines} {fleet.name}: {title}")
        systems: dict[str, SystemUnderTest] = {OURS: await stack.enter_async_context(ours)}
        behind: dict[str, SystemUnderTest] = {OURS: ours}
        for peer, engines in _make_peers(scenario, fleets, versions, num_sharing):
            try:
                systems[peer.name] = await stack.enter_async_context(peer)
                behind[peer.name] = engines
            except MeasureError as error:
                print_progress(f"{peer.name} is skipped: {error}")
                report.add_note(f"{peer.name} is skipped: it did not start.")
        print_progress(f"up: {', '.join(systems)}")
        rate = scenario.rate or await _choose_rate(scenario, ours)
        report.config["sent_requests_per_s"] = rate
        testbed = Testbed(systems, behind, scenario.timeout_s)
        for repeat in range(-1, scenario.num_repeats):  # the first warms everything up
            order = list(systems)
            random.Random(f"order {scenario.seed} {repeat}").shuffle(order)
            for name in order:
                duration_s = scenario.duration_s if repeat >= 0 else scenario.warm_up_s
                requests = scenario.mix.arrivals(rate, duration_s, f"{scenario.seed} {repeat}")
                requests = dilated_arrivals(requests, scenario.dilation)
                for trial in range(scenario.max_tries if repeat >= 0 else 1):
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
        num_late = sum(
            fleet.num_late() for fleet in fleets.values() if isinstance(fleet, EmulatedFleet)
        )
        state = await ours.state()
    samples = [
        undilated_sample(sample, scenario.dilation)
        for each in chain(*runs.values())
        for sample in each.samples
    ]
    latencies = Latencies(samples)
    latencies.fill(report)
    for name, counted in runs.items():
        system = systems[name]
        report.add_row(
            "Turns that count, and what they cost",
            policy=name,
            engines=system.engines if isinstance(system, Peer) else "ours",
            taken_again=repeated[name],
            sent_late_p99_ms=Spread.of([1e3 * each.late_s for each in counted]),
            router_cpu_s=Spread.of([each.cost.router_s for each in counted]),
            router_cpu_ms_per_request=Spread.of(
                [1e3 * each.cost.router_s / len(each.samples) for each in counted]
            ),
            engines_cpu_s=Spread.of([each.cost.engines_s for each in counted]),
            others_cpu_s=Spread.of([each.cost.others_s for each in counted]),
        )
    report.config["prediction_accuracy"] = msgspec.to_builtins(state.accuracy)
    rivals = [name for name in systems if name != OURS]
    latencies.set_targets(report, OURS, rivals)
    _set_cpu_target(report, runs)
    latencies.note_failures(report)
    for note in _notes(scenario, num_late):
        report.add_note(note)
    return report, samples


def _set_cpu_target(report: Report, runs: dict[str, list[MeasuredRun]]) -> None:
    """Compare what our gateway takes of the processor with HAProxy, the leanest of all."""
    name = f"{HAProxy.title} {HAProxy.policies[0]}"
    if counted := runs.get(name):
        ours_s, theirs_s = (
            statistics.median(each.cost.router_s for each in of) for of in (runs[OURS], counted)
        )
        title = f"gateway CPU of {OURS} over that of {name}"
        report.add_target(title, ours_s / theirs_s, "<= 1.3")


def _make_peers(
    scenario: Scenario,
    fleets: dict[Any, EmulatedFleet | VllmFleet],
    versions: dict[str, str],
    num_sharing: int,
) -> Iterator[tuple[Peer, SystemUnderTest]]:
    """Yield every peer with every policy and every kind of engines, and these engines."""
    for peer in PEERS:
        policies = peer.policies[:1] if scenario.one_policy else peer.policies
        for policy in policies if peer.title in versions else ():
            for settings, fleet in fleets.items():
                yield peer(policy, fleet.urls, scenario.model, settings), fleet
    if VllmDataParallel.title in versions:
        data_parallel = VllmDataParallel(scenario.num_engines, num_sharing=num_sharing)
        yield data_parallel, data_parallel


def _install_peers(scenario: Scenario, report: Report) -> dict[str, str]:
    """Install the peers. Return their versions; those that cannot be installed are skipped."""
    versions: dict[str, str] = {}
    for peer in _ALL_PEERS:
        if peer is VllmDataParallel and scenario.profile:
            continue  # its engines are real
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
        "Engines behind the peers have Headway's settings, the largest prefill chunk among them, "
        "or vLLM's own (stock engines). TTFT targets as priorities and the cap on prefill inside "
        "an engine are a part of Headway; the peers' engines schedule as vLLM does, first come, "
        "first served."
    )
    if scenario.dilation != 1:
        yield (
            f"Steps, arrivals and TTFT targets took {scenario.dilation:g} times as long. Times are "
            f"divided by {scenario.dilation:g}, CPU times are not: of what remains of differences, "
            "CPU time has so many times less a part."
        )
    yield (
        "Ray Serve LLM's own router is skipped: it starts vLLM engines of its own and cannot be "
        "put in front of these."
    )
    yield (
        f"A run is repeated, up to {scenario.max_tries} times in all, if requests were sent more "
        f"than {1e3 * scenario.max_late_s:g} ms late (p99) while the router took less than "
        f"{BUSY_ROUTER_CPU:g} processors, or if other work kept {MAX_OTHERS_CPU:g} processors "
        "busy. The last one counts."
    )
    if num_late:
        yield f"{num_late} times an engine was late: this machine is too slow for this rate."


def _parse() -> list[Scenario]:
    titles = [peer.title for peer in _ALL_PEERS]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--emulated", action="store_true", help="only in front of emulated H100s")
    parts.add_argument("--real", action="store_true", help="only in front of real vLLM engines")
    parser.add_argument("--peers", nargs="+", choices=titles, default=titles, metavar="PEER")
    parser.add_argument(
        "--rival-engines",
        nargs="+",
        choices=("ours", "stock"),
        help="settings of the engines behind the peers: both, real ones ours; each kind of real "
        "ones takes 5 GB",
    )
    parser.add_argument("--profile", default="h100-llama8b", help="of the emulated engines")
    parser.add_argument(
        "--dilation",
        type=float,
        default=1.0,
        help="of emulated engines: so many times as long as in the profile take steps, times "
        "between arrivals and targets, so that CPU time hardly counts",
    )
    parser.add_argument("--engines", type=int, help="8 emulated, 2 real")
    parser.add_argument(
        "--rate", type=float, help="requests/s: 70, or 75 %% of what real ones carry"
    )
    parser.add_argument("--duration", type=float, help="of arrivals per run, s: 15, real 45")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--max-tries", type=int, default=2, help="of a run that other programs have disturbed"
    )
    parser.add_argument("--one-policy", action="store_true", help="only the first of each peer")
    parser.add_argument("--seed", type=int, default=0)
    options: Any = parser.parse_args()
    if options.dilation != 1 and not options.emulated:
        parser.error("--dilation: only emulated engines have a time of their own: --emulated")
    return [
        Scenario(
            peers=tuple(options.peers),
            rival_engines=tuple(
                options.rival_engines or (("ours",) if is_real else ("ours", "stock"))
            ),
            profile=None if is_real else options.profile,
            num_engines=options.engines or (2 if is_real else 8),
            rate=options.rate or (None if is_real else 70.0),
            duration_s=options.duration or (45.0 if is_real else 15.0),
            num_repeats=options.repeats,
            seed=options.seed,
            one_policy=options.one_policy,
            dilation=options.dilation,
            max_tries=options.max_tries,
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
