"""Which policy is best on two real vLLM engines?

    python -m benchmarks.policies.real

One deployment serves all runs. Only the policy changes between them, in an order that each repeat
shuffles. The engines (their step budget and priorities) are the same for every policy, so this
compares placement and holding alone. Load generator, gateway and engines share the machine's cores.
"""

import argparse
import random
import sys
import time
from dataclasses import asdict
from typing import Any

from benchmarks.load.capacity import NUM_WORKERS
from benchmarks.policies.comparison import Comparison, Scenario
from benchmarks.report.latency import Sample, finish_comparison
from benchmarks.report.report import Report
from benchmarks.report.runner import print_progress, run_to_the_end
from benchmarks.systems.real_engines import RealEngines
from router.simulation.variant import SATURATING_POLICY, policies, renamed, split
from serving.config.renamed import warn_renamed

NUM_ENGINES = 2


async def run(scenario: Scenario) -> tuple[Report, list[Sample]]:
    """Run the scenario. Return the report and every request's sample."""
    service = RealEngines(NUM_ENGINES)
    print_progress("starting the engines")
    started_s = time.perf_counter()
    async with service:
        model = await service.model()
        print_progress(
            f"{NUM_ENGINES} engines with {model}: ready in {time.perf_counter() - started_s:.0f} s"
        )
        comparison = Comparison(scenario, service, model)
        capacity = await comparison.measure_capacity()  # also warms the engines up
        rate = scenario.load * capacity if scenario.rate is None else scenario.rate
        print_progress(f"capacity {capacity:.2f} requests/s; sending {rate:.2f}/s")
        for repeat in range(scenario.num_repeats):
            order = list(scenario.policies)
            random.Random(f"order {scenario.seed} {repeat}").shuffle(order)
            for number, policy in enumerate(order, start=1):
                print_progress(
                    f"repeat {repeat + 1} of {scenario.num_repeats}, run {number} of {len(order)}"
                )
                await comparison.run(repeat, policy, rate)
    name = "real-shared-prefix" if scenario.shared_prefix else "real"
    name += "-primed" if scenario.primed else ""
    config: dict[str, Any] = {
        **asdict(scenario),
        "mix": asdict(comparison.mix),
        "model": model,
        "num_engines": NUM_ENGINES,
        "capacity_requests_per_s": capacity,
        "capacity_policy": SATURATING_POLICY,
        "capacity_num_workers": NUM_WORKERS,
        "sent_requests_per_s": rate,
    }
    report = Report(name, "measured", scenario.seed, config)
    comparison.fill(report)
    return report, comparison.samples


def _parse() -> Scenario:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--policies",
        nargs="+",
        default=policies(),
        metavar="POLICY",
        help="default: all; headway:hold,order is headway without these two",
    )
    parser.add_argument("--duration", type=float, default=60.0, help="of arrivals per run, s")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--load", type=float, default=0.75, help="share of the capacity")
    parser.add_argument("--rate", type=float, help="requests/s, whatever the capacity")
    parser.add_argument(
        "--calibration", type=float, default=40.0, help="seconds of measuring the capacity"
    )
    parser.add_argument("--shared-prefix", action="store_true", help="6 shared system prompts")
    parser.add_argument(
        "--primed",
        action="store_true",
        help="before a run every engine has prefilled the system prompts",
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    variants = tuple(dict.fromkeys(options.policies))
    for variant in variants:
        try:
            split(variant)
            warn_renamed(renamed(variant))
        except ValueError as error:
            parser.error(str(error))
    if options.primed and not options.shared_prefix:
        parser.error("--primed: there are system prompts with --shared-prefix only")
    return Scenario(
        variants,
        options.duration,
        options.repeats,
        options.load,
        options.rate,
        options.calibration,
        options.shared_prefix,
        options.primed,
        options.seed,
    )


def main() -> int:
    scenario = _parse()
    finish_comparison(*run_to_the_end(lambda: run(scenario)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
