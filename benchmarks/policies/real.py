"""Policies compared on two real vLLM engines: `python -m benchmarks.policies.real`.

One deployment serves all runs; only the policy changes between them, in an
order that is shuffled anew per repeat. The engines themselves (step budget,
priority inside) are the same for every policy, so this compares placement
and holding alone. Load generator, gateway and engines share the machine's
cores.
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.policies.comparison import NUM_WORKERS, Comparison, Plan, finish, say
from benchmarks.report.latency import Sample
from benchmarks.report.report import Report
from benchmarks.report.runner import run_to_the_end
from benchmarks.systems.real_engines import RealEngines
from router.simulation.variant import SATURATING_POLICY, policies, renamed, split
from serving.renamed import warn_renamed

NUM_ENGINES = 2


async def run(plan: Plan) -> tuple[Report, list[Sample]]:
    """Carry out the plan; return the report and every request's sample."""
    subject = RealEngines(NUM_ENGINES)
    say("starting the engines")
    started_s = time.perf_counter()
    async with subject:
        model = await subject.model()
        say(f"{NUM_ENGINES} engines with {model}: ready in {time.perf_counter() - started_s:.0f} s")
        comparison = Comparison(plan, subject, model)
        capacity = await comparison.capacity()  # also warms what is to be measured
        rate = plan.load * capacity if plan.rate is None else plan.rate
        say(f"capacity {capacity:.2f} requests/s; sending {rate:.2f}/s")
        for repeat in range(plan.num_repeats):
            order = list(plan.policies)
            random.Random(f"order {plan.seed} {repeat}").shuffle(order)
            for number, policy in enumerate(order, start=1):
                say(f"repeat {repeat + 1} of {plan.num_repeats}, run {number} of {len(order)}")
                await comparison.run(repeat, policy, rate)
    name = "real-shared-prefix" if plan.shared_prefix else "real"
    name += "-primed" if plan.primed else ""
    config: dict[str, Any] = {
        **asdict(plan),
        "mix": asdict(comparison.mix),
        "model": model,
        "num_engines": NUM_ENGINES,
        "capacity_requests_per_s": capacity,
        "capacity_policy": SATURATING_POLICY,
        "capacity_num_workers": NUM_WORKERS,
        "sent_requests_per_s": rate,
    }
    report = Report(name, "measured", plan.seed, config)
    comparison.fill(report)
    return report, comparison.samples


def _parse(arguments: Sequence[str] | None) -> Plan:
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
    parser.add_argument("--calibration", type=float, default=40.0, help="capacity's window, s")
    parser.add_argument("--shared-prefix", action="store_true", help="6 shared system prompts")
    parser.add_argument(
        "--primed", action="store_true", help="each engine knows the system prompts before a run"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    variants = tuple(dict.fromkeys(options.policies))
    for variant in variants:
        try:
            split(variant)
            warn_renamed(renamed(variant))
        except ValueError as error:
            parser.error(str(error))
    if options.primed and not options.shared_prefix:
        parser.error("--primed: there are system prompts with --shared-prefix only")
    return Plan(
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
    plan = _parse(None)
    finish(*run_to_the_end(lambda: run(plan)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
