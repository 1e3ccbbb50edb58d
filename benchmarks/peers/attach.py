"""How does `headway attach` do in front of two plain vLLM servers, beside nginx and vllm-router?

    python -m benchmarks.peers.attach

The same two servers behind all of them, with vLLM's own settings; they know nothing of any router.
One router at a time gets load, the same requests at the same times, in an order that each repeat
shuffles. `--own` adds `headway serve` with
two engines of its own, which take 7 GB more.
"""

import argparse
import contextlib
import random
import sys
from collections import defaultdict
from dataclasses import asdict
from functools import partial
from typing import Any

from benchmarks.load.mix import Mix
from benchmarks.peers.fleet import VllmFleet
from benchmarks.peers.routers.attached import Attached
from benchmarks.peers.routers.nginx import Nginx
from benchmarks.peers.routers.peer import MissingError, Peer
from benchmarks.peers.routers.vllm_router import VllmRouter
from benchmarks.peers.testbed import MAX_OTHERS_CPU, MeasuredRun, Testbed
from benchmarks.report.latency import Latencies, Sample, finish_comparison
from benchmarks.report.report import Report, Spread
from benchmarks.report.runner import print_progress, run_to_the_end
from benchmarks.systems.real_engines import RealEngines
from serving.capacity.launch import MeasureError
from serving.capacity.service import SystemUnderTest
from serving.planning.bundled_model import SERVED_MODEL_NAME

NAME = "attach"
_NUM_SERVERS = 2
_WARM_UP_S = 8.0
_TIMEOUT_S = 120.0
_OWN = "headway serve, own engines"


async def run(options: argparse.Namespace) -> tuple[Report, list[Sample]]:
    """Measure all routers. Return the report and every request's sample."""
    mix = Mix()
    report = Report(NAME, "measured", options.seed, {**vars(options), "mix": asdict(mix)})
    kinds = _installed(report)
    runs: dict[str, list[MeasuredRun]] = defaultdict(list)
    async with contextlib.AsyncExitStack() as stack:
        sharing = _NUM_SERVERS * (2 if options.own else 1)
        fleet = await stack.enter_async_context(VllmFleet(_NUM_SERVERS, "stock", sharing))
        print_progress(f"{_NUM_SERVERS} plain vLLM servers are up")
        systems: dict[str, SystemUnderTest] = {}
        behind: dict[str, SystemUnderTest] = {}
        for kind in kinds:
            peer = kind(kind.policies[0], fleet.urls, SERVED_MODEL_NAME)
            try:
                systems[peer.name] = await stack.enter_async_context(peer)
                behind[peer.name] = fleet
            except MeasureError as error:
                print_progress(f"{peer.name} is skipped: {error}")
                report.add_note(f"{peer.name} is skipped: it did not start.")
        if options.own:
            own = await stack.enter_async_context(RealEngines(_NUM_SERVERS))
            systems[_OWN] = behind[_OWN] = own
        testbed = Testbed(systems, behind, _TIMEOUT_S)
        for repeat in range(-1, options.repeats):  # the first warms everything up
            order = list(systems)
            random.Random(f"order {options.seed} {repeat}").shuffle(order)
            for name in order:
                duration_s = options.duration if repeat >= 0 else _WARM_UP_S
                seed = f"{options.seed} {repeat}"
                measured = await testbed.measure_run(
                    name,
                    mix.arrivals(options.rate, duration_s, seed),
                    mix,
                    SERVED_MODEL_NAME,
                    repeat,
                    f"{seed} {name}",
                )
                if repeat >= 0:
                    runs[name].append(measured)
    samples = [sample for each in runs.values() for measured in each for sample in measured.samples]
    latencies = Latencies(samples)
    latencies.fill(report)
    _add_costs(report, runs)
    ours = Attached.title
    if ours in runs:
        latencies.set_targets(report, ours, [name for name in runs if name not in (ours, _OWN)])
    latencies.note_failures(report)
    report.add_note(
        "The servers have vLLM's own settings and schedule first come, first served; each is on a "
        "core of its own, which it shares with routers, load generator and whatever else runs."
    )
    busy = [each for of in runs.values() for each in of if each.was_disturbed(0.1)]
    report.add_note(
        f"{len(busy)} of {sum(map(len, runs.values()))} runs were disturbed: other work kept more "
        f"than {MAX_OTHERS_CPU:g} processors busy, or requests were sent late. They count."
    )
    return report, samples


def _installed(report: Report) -> list[type[Peer]]:
    """Return the routers that are here, or can be installed; note the others."""
    found: list[type[Peer]] = []
    versions = report.config["versions"] = {}
    for kind in (Attached, Nginx, VllmRouter):
        try:
            versions[kind.title] = kind.install()
            found.append(kind)
        except MissingError as error:
            print_progress(f"{kind.title} is skipped: {error}")
            report.add_note(f"{kind.title} is skipped: {error}.")
    return found


def _add_costs(report: Report, runs: dict[str, list[MeasuredRun]]) -> None:
    for name, counted in runs.items():
        report.add_row(
            "What the runs cost",
            policy=name,
            sent_late_p99_ms=Spread.of([1e3 * each.late_s for each in counted]),
            router_cpu_ms_per_request=Spread.of(
                [1e3 * each.cost.router_s / len(each.samples) for each in counted]
            ),
            others_cpu_share=Spread.of([each.cost.others_s / each.span_s for each in counted]),
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rate", type=float, default=1.5, help="requests/s of the mix")
    parser.add_argument("--duration", type=float, default=40.0, help="of arrivals per run, s")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--own", action="store_true", help="and `headway serve` beside")
    options: Any = parser.parse_args()
    finish_comparison(*run_to_the_end(partial(run, options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
