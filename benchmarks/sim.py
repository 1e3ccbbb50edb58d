"""Policies compared in simulation: `python -m benchmarks.sim`.

The deployed router over simulated engines in virtual time, workload by workload, fleet
by fleet, load by load, beside a clairvoyant reference. Nothing here was measured on
hardware: every figure says "simulated".
"""

import argparse
import csv
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from benchmarks import clairvoyant
from benchmarks.curves import plot_sweep
from benchmarks.figures import Figures, interval, knee
from benchmarks.profile import Profile, ProfileError
from benchmarks.report import RESULTS, Figure, Report
from benchmarks.slo import Slo
from benchmarks.sweep import Case, Sweep
from benchmarks.synthetic import SYNTHETIC
from benchmarks.traces import TraceError, read_trace
from benchmarks.variant import OURS, ablations, policies, split
from benchmarks.workload import Workload

# Public traces by the names that they are published under, and likely ones.
TRACES = {
    "azure-code": ("*azure*code*",),
    "azure-conversation": ("*azure*conv*",),
    "mooncake": ("*mooncake*conv*", "conversation_trace*"),
    "servegen": ("*servegen*m-large*", "*servegen*", "*m-large*"),
}
# A fleet of this size gets a trace as it is, a larger one copies laid over each other.
_ENGINES_PER_COPY = 8
_LOADS = (0.5, 0.7, 0.8, 0.9, 0.95)
# Of fleets larger than that: a run costs as much more as they have requests.
_LOADS_OF_LARGE = (0.5, 0.8, 0.95)
# Ours is said to lose where another is better by more than this.
_NOISE = 0.05
_JUDGED = {  # figure: whether less is better
    "ttft_p50_s": True,
    "ttft_p99_s": True,
    "short_ttft_p99_s": True,
    "long_ttft_p99_s": True,
    "tpot_p99_s": True,
    "goodput": False,
    "output_tokens_per_s": False,
}

console = Console(highlight=False)
Results = dict[Case, Figures]


def main(arguments: Sequence[str] | None = None) -> int:
    started_s = time.perf_counter()
    options = _parse(arguments)
    try:
        profile = Profile.load(options.profile)
        workloads = dict(_workloads(options, profile))
    except (ProfileError, TraceError) as error:
        console.print(str(error), markup=False)
        return 1
    slo = Slo(options.slo_ttft, options.slo_tpot)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end the processes, too
    try:
        with Sweep(workloads, profile, slo, num_gateways=options.gateways) as sweep:
            capacities = _capacities(options, sweep, list(workloads))
            results = _run(sweep, list(_cases(options, list(workloads), capacities)))
    except KeyboardInterrupt:
        console.print("Stopped before the end: nothing is written.")
        return 130
    config = {
        "profile": profile.model_dump(),
        "num_gateways": options.gateways,
        "loads": options.loads or {"small": _LOADS, "large": _LOADS_OF_LARGE},
        "variants": options.policies,
        "slo": str(slo),
        "num_repeats": options.repeats,
        "capacities_requests_per_s": {
            f"{name}, {num_engines} engines": capacity
            for (name, num_engines), capacity in capacities.items()
        },
        "workloads": {key: each.describe() for key, each in workloads.items()},
        "wall_s": time.perf_counter() - started_s,
    }
    report = Report(options.name, "simulated", options.seed, config)
    _fill(report, options, results)
    if options.dry:
        report.show(console)
        return 0
    report.finish()
    lines = RESULTS / f"{report.name}.csv"
    _write_csv(results, lines)
    figures = [path.name for path in plot_sweep(lines)]
    console.print(f"Every run: {lines.name}; figures: {', '.join(figures)}")
    return 0


def _workloads(options: argparse.Namespace, profile: Profile) -> Iterator[tuple[str, Workload]]:
    """Yield each workload for each fleet and repeat, by its key."""
    found = [(path.name.partition(".")[0], path) for path in options.trace]
    if options.traces is not None:
        files = sorted(options.traces.iterdir()) if options.traces.is_dir() else []
        for title, patterns in TRACES.items():
            matches = (
                file
                for pattern in patterns
                for file in files
                if fnmatch(file.name.lower(), pattern)
            )
            if (path := next(matches, None)) is not None:
                found.append((title, path))
            else:
                console.print(f"{title}: no such trace in {options.traces}; skipped")
    elif not found:
        console.print("No --traces: the public traces are skipped, made-up workloads used instead.")
    synthetic = options.synthetic
    if synthetic is None:
        synthetic = [] if found else ["poisson", "bursty", "conversations"]
    bases = [(title, read_trace(path, options.seed)) for title, path in found]
    bases += [(name, SYNTHETIC[name](4 * options.requests, options.seed)) for name in synthetic]
    for title, base in bases:
        fitted = base.fitted(profile.max_model_len)
        for num_engines in options.engines:
            num_copies = max(1, num_engines // _ENGINES_PER_COPY)
            for repeat in range(options.repeats):
                part = fitted.part(repeat, options.requests).overlaid(num_copies)
                yield _key(title, num_engines, repeat), part


def _key(title: str, num_engines: int, repeat: int) -> str:
    return f"{title}/{num_engines}/{repeat}"


def _capacities(
    options: argparse.Namespace, sweep: Sweep, keys: Sequence[str]
) -> dict[tuple[str, int], float]:
    """Return the capacity of each (workload, fleet); that of its first part stands for all."""
    wanted = []
    for key in keys:
        title, num_engines, repeat = key.split("/")
        if repeat == "0":
            wanted.append((title, int(num_engines)))
    found = {}
    pairs = [(_key(title, num_engines, 0), num_engines) for title, num_engines in wanted]
    for (title, num_engines), capacity in zip(wanted, sweep.capacities(pairs), strict=True):
        console.print(f"{title}, {num_engines} engines: {capacity:.1f} requests/s (simulated)")
        found[title, num_engines] = capacity
    return found


def _cases(
    options: argparse.Namespace, keys: Sequence[str], capacities: dict[tuple[str, int], float]
) -> Iterator[Case]:
    for key in keys:
        title, engines, repeat = key.split("/")
        num_engines = int(engines)
        for load in _loads(options, num_engines):
            rate = load * capacities[title, num_engines]
            for variant in options.policies:
                seed = options.seed + int(repeat)
                yield Case(key, num_engines, load, rate, variant, int(repeat), seed)


def _loads(options: argparse.Namespace, num_engines: int) -> list[float]:
    if options.loads is not None:
        return sorted(options.loads)
    return list(_LOADS if num_engines <= _ENGINES_PER_COPY else _LOADS_OF_LARGE)


def _run(sweep: Sweep, cases: Sequence[Case]) -> Results:
    results: Results = {}
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("simulated runs", total=len(cases))
        for case, figures in zip(cases, sweep.figures(cases), strict=True):
            results[case] = figures
            progress.advance(task)
    return results


def _fill(report: Report, options: argparse.Namespace, results: Results) -> None:
    """Make the tables and say where ours loses."""
    groups: dict[tuple[str, int], None] = {}
    by_place: dict[tuple[str, int, float, str], list[Figures]] = {}
    for case, figures in results.items():
        title = case.workload.partition("/")[0]
        groups[title, case.num_engines] = None
        place = (title, case.num_engines, case.load, case.variant)
        by_place.setdefault(place, []).append(figures)

    def mean(place: tuple[str, int, float, str], name: str) -> float:
        values = [each[name] for each in by_place[place] if not math.isnan(each[name])]
        return sum(values) / len(values) if values else float("nan")

    for title, num_engines in groups:
        loads = _loads(options, num_engines)
        shown = max((load for load in loads if load <= 0.8), default=loads[0])
        for variant in options.policies:
            place = (title, num_engines, shown, variant)
            row: dict[str, Figure] = {"policy": variant}
            for label, name in (
                ("short_p50", "short_ttft_p50_s"),
                ("short_p99", "short_ttft_p99_s"),
                ("long_p99", "long_ttft_p99_s"),
                ("p50", "ttft_p50_s"),
                ("p90", "ttft_p90_s"),
                ("p99", "ttft_p99_s"),
            ):
                row[label] = _known(mean(place, name))
            if options.repeats > 1:
                low, high = interval([each["ttft_p99_s"] for each in by_place[place]])
                row["p99_95%"] = f"{low:.2f} to {high:.2f}"
            row |= {
                "hold_mean_ms": _known(1e3 * mean(place, "hold_mean_s")),
                "tpot_p50_ms": _known(1e3 * mean(place, "tpot_p50_s")),
                "tpot_p99_ms": _known(1e3 * mean(place, "tpot_p99_s")),
                "e2e_p99": _known(mean(place, "e2e_p99_s")),
                "goodput": _known(mean(place, "goodput")),
                "tokens/s": _known(mean(place, "output_tokens_per_s")),
                "fairness": _known(mean(place, "fairness")),
                "prefix_hits": _known(mean(place, "prefix_hit_share")),
                "shed": _known(mean(place, "num_shed")),
                "preempted": _known(mean(place, "num_preemptions")),
            }
            report.row(
                f"{title}, {num_engines} engines, {shown:.0%} load, simulated: TTFT and more, s",
                **row,
            )
        if len(loads) < 2:
            continue
        for variant in options.policies:
            p99_s = [mean((title, num_engines, load, variant), "ttft_p99_s") for load in loads]
            goodput = [mean((title, num_engines, load, variant), "goodput") for load in loads]
            report.row(
                f"{title}, {num_engines} engines, simulated: over the load",
                policy=variant,
                **{
                    f"p99_{load:.0%}": _known(value)
                    for load, value in zip(loads, p99_s, strict=True)
                },
                knee=knee(loads, p99_s),
                **{
                    f"goodput_{load:.0%}": _known(value)
                    for load, value in zip(loads, goodput, strict=True)
                },
            )
    rivals = [name for name in options.policies if name in policies() and name != OURS]
    if OURS in options.policies and rivals:
        for title, num_engines in groups:
            for load in _loads(options, num_engines):
                for figure, less in _JUDGED.items():
                    ours = mean((title, num_engines, load, OURS), figure)
                    theirs = {
                        rival: mean((title, num_engines, load, rival), figure) for rival in rivals
                    }
                    best = (min if less else max)(theirs, key=lambda rival: theirs[rival])
                    worse = ours / theirs[best] if less else theirs[best] / ours
                    if worse > 1.0 + _NOISE:
                        report.note(
                            f"Headway loses (simulated): {title}, {num_engines} engines, load "
                            f"{load:.0%}: {figure} {ours:.3g}, {best} {theirs[best]:.3g}"
                        )
    report.note(
        "The knee is the highest load at which the p99 of TTFT is at most twice that of the "
        "lowest load. Load: share of what the fleet completes when all requests are there from "
        f"the start. Goodput: {report.config['slo']}. Fairness: Jain's index of goodput over "
        "tenants, or over short and long prompts. Short: the lower half of the prompts by size; "
        "long: the upper tenth. The first tenth of each run is not counted."
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _write_csv(results: Results, path: Path) -> None:
    """Write one line per run."""
    with path.open("w", newline="") as file:
        names = list(dict.fromkeys(name for figures in results.values() for name in figures))
        fields = ["kind", *Case.__dataclass_fields__, *names]
        writer = csv.DictWriter(file, fields, lineterminator="\n", restval="")
        writer.writeheader()
        for case, figures in results.items():
            row = asdict(case) | {name: f"{value:.6g}" for name, value in figures.items()}
            writer.writerow({**row, "kind": "simulated", "rate": f"{case.rate:.6g}"})


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="h100", help="a profile's name or file")
    parser.add_argument("--engines", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--gateways", type=int, default=1)
    environment = os.environ.get("HEADWAY_TRACES")
    parser.add_argument(
        "--traces",
        type=Path,
        metavar="DIR",
        default=Path(environment) if environment else None,
        help="with the public traces (see benchmarks/traces); default: $HEADWAY_TRACES",
    )
    parser.add_argument("--trace", type=Path, nargs="+", default=[], help="any trace files")
    parser.add_argument(
        "--synthetic",
        nargs="*",
        choices=list(SYNTHETIC),
        default=None,
        help="made-up workloads beside or instead of traces",
    )
    parser.add_argument(
        "--loads", type=float, nargs="+", help="shares of the capacity; default: 0.5 to 0.95"
    )
    parser.add_argument(
        "--policies",
        nargs="+",
        metavar="POLICY",
        default=[*policies(), *ablations(), clairvoyant.NAME],
        help="default: all, ours without each part, and the clairvoyant reference; "
        "headway:hold,order is headway without these two",
    )
    parser.add_argument(
        "--requests", type=int, default=3000, help="of a run of 8 engines; more with more"
    )
    parser.add_argument("--repeats", type=int, default=1, help="on successive parts of a trace")
    parser.add_argument("--slo-ttft", type=float, help="s; default: what the router promises")
    parser.add_argument("--slo-tpot", type=float, default=0.05, help="s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="sim", help="of the files in benchmarks/results")
    parser.add_argument("--dry", action="store_true", help="show the tables, write nothing")
    options = parser.parse_args(arguments)
    for variant in options.policies:
        if variant != clairvoyant.NAME:
            try:
                split(variant)
            except ValueError as error:
                parser.error(str(error))
    return options


if __name__ == "__main__":
    sys.exit(main())
