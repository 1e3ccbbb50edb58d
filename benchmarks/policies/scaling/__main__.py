"""Which autoscaler misses fewest promises, for how many GPU-hours? Simulated.

    python -m benchmarks.policies.scaling

The deployed router, and the deployed autoscaler, over simulated engines that take 30, 120 or 300 s
to start. Rivals run at two settings each, so that what they miss can be compared at what ours
costs.
"""

import argparse
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

from benchmarks.policies.scaling.runs import (
    CLAIRVOYANT,
    MAX_ENGINES,
    OURS,
    OURS_ROOMY,
    SLO,
    STARTS_S,
    Outcome,
    draws,
    measured_rates,
    scalers,
    simulate,
)
from benchmarks.policies.scaling.workloads import DAY_S
from benchmarks.report.console import make_console
from benchmarks.report.report import Report
from router.simulation.engine.profile import StepTimeFactors
from serving.capacity.profiles import ProfileError, load_profile

_OWN = (OURS, OURS_ROOMY)

console = make_console()


def main() -> int:
    options = _parse()
    try:
        profile = load_profile(options.profile)
    except ProfileError as error:
        console.print(str(error), markup=False)
        return 1
    if options.slower != 1.0:
        profile = profile.slowed(StepTimeFactors(options.slower, options.slower))
    began_s = time.process_time()
    config = {
        "profile": profile.model_dump(),
        "steps_so_many_times_as_long_as_the_profile": options.slower,
        "promise": str(SLO),
        "max_engines": MAX_ENGINES,
        "starts_s": options.starts,
    }
    report = Report(options.name, "simulated", options.seed, config)
    found: dict[tuple[str, float], dict[str, Outcome]] = defaultdict(dict)
    for title, draw in draws(options.traces).items():
        if options.only and not any(each in title for each in options.only):
            continue
        workload = draw(options.seed).fitted(profile.max_model_len)
        config.setdefault("workloads", {})[title] = workload.describe()
        rates = measured_rates(workload, profile)
        season_s = DAY_S if "days" in title else 24 * 3_600.0
        for start_s in options.starts:
            for name, scaler in scalers(workload, rates, start_s, season_s):
                outcome = simulate(workload, profile, scaler, rates, start_s)
                found[title, start_s][name] = outcome
                console.print(
                    f"{title}, start {start_s:g} s, {name}: {outcome.missed:.2%} missed, "
                    f"{outcome.refused:.2%} refused, {outcome.engine_hours:.2f} engine-hours"
                )
    config["cpu_s"] = time.process_time() - began_s
    _fill(report, found)
    if options.dry:
        report.show(console)
    else:
        report.finish()
    return 0


def _fill(report: Report, found: dict[tuple[str, float], dict[str, Outcome]]) -> None:
    for (title, start_s), outcomes in found.items():
        for name, each in outcomes.items():
            report.add_row(
                f"{title}, start {start_s:g} s, simulated",
                scaler=name,
                missed=each.missed,
                refused=each.refused,
                engine_hours=each.engine_hours,
                most_engines=each.most_engines,
                starts=each.num_starts,
                recalled=each.num_recalls,
            )
        theirs = {
            name: each
            for name, each in outcomes.items()
            if name not in _OWN and name != CLAIRVOYANT
        }
        for name in _OWN:
            own = outcomes[name]
            at_cost = missed_at(list(theirs.values()), own.engine_hours)
            report.add_target(
                f"{title}, start {start_s:g} s, {name}: missed promises as a share of what the "
                "best reactive one misses for as many engine-hours",
                own.missed / at_cost if at_cost else None,
                "<= 0.5",
            )
        best = min(theirs, key=lambda each: (theirs[each].missed, theirs[each].engine_hours))
        for name in _OWN:
            report.add_note(
                f"{title}, start {start_s:g} s: {name} misses {outcomes[name].missed:.2%} for "
                f"{outcomes[name].engine_hours:.2f} engine-hours; the reactive one that misses "
                f"least, whatever it costs, is {best}: {theirs[best].missed:.2%} for "
                f"{theirs[best].engine_hours:.2f}"
            )


def missed_at(outcomes: list[Outcome], engine_hours: float) -> float:
    """Return the least share that is missed for so many engine-hours, by these runs.

    Straight lines between runs, as if one could run each a part of the time. Whoever costs less
    can cost more for nothing; for less than the cheapest costs, the cheapest is taken.
    """
    points = sorted((each.engine_hours, each.missed) for each in outcomes)
    cheaper = [missed for hours, missed in points if hours <= engine_hours]
    if not cheaper:
        return points[0][1]
    least = min(cheaper)
    for low_hours, low_missed in points:
        for high_hours, high_missed in points:
            if low_hours <= engine_hours < high_hours:
                share = (engine_hours - low_hours) / (high_hours - low_hours)
                least = min(least, low_missed + share * (high_missed - low_missed))
    return least


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="h100-llama8b", help="a profile's name or file")
    parser.add_argument(
        "--slower",
        type=float,
        default=6.0,
        help="times as long as the profile's steps: a model of about 400B on a node of 8 such "
        "GPUs has 50 times the weights of 8B and 8 times the hardware",
    )
    environment = os.environ.get("HEADWAY_TRACES")
    parser.add_argument(
        "--traces",
        type=Path,
        metavar="DIR",
        default=Path(environment) if environment else None,
        help="with the public traces (docs/simulator.md); default: $HEADWAY_TRACES",
    )
    parser.add_argument("--starts", type=float, nargs="+", default=list(STARTS_S))
    parser.add_argument("--only", nargs="+", help="workloads whose names have one of these in them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="scaling", help="of the file in benchmarks/results")
    parser.add_argument("--dry", action="store_true", help="show the tables, write nothing")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
