"""Which policy is best on fleets that we do not have? Simulated.

    python -m benchmarks.policies.simulated

The deployed router over simulated engines in virtual time: each workload, fleet and load, beside a
clairvoyant reference. Nothing is measured on hardware, and every figure says "simulated".
"""

import argparse
import csv
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path

from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from benchmarks.policies.simulated_grid import (
    LOADS,
    SQUEEZED,
    Place,
    cases,
    places,
    variants_at_shown_load,
)
from benchmarks.policies.simulated_tables import Results, Tables
from benchmarks.report.console import make_console
from benchmarks.report.plot_sweep import plot_sweep
from benchmarks.report.report import RESULTS, Report
from router.simulation import clairvoyant
from router.simulation.figures import STEADY, Promises
from router.simulation.variant import on_stock, renamed, split
from router.simulation.workload.synthetic import SYNTHETIC
from router.simulation.workload.workload import Workload
from serving.capacity.profiles import ProfileError, load_profile
from serving.capacity.sweep import Case, Sweep
from serving.capacity.traces import TraceError, read_trace
from serving.config.renamed import warn_renamed
from serving.core_form import form

# File names of the public traces: as published, and likely ones.
TRACES = {
    "azure-code": ("*azure*code*",),
    "azure-conversation": ("*azure*conv*",),
    "mooncake": ("*mooncake*conv*", "conversation_trace*"),
    "servegen": ("*servegen*m-large*", "*m-large*"),
    "servegen-reasoning": ("*servegen*deepseek-r1*", "*deepseek-r1*"),
    "agents": ("*agentic*", "*claude*code*"),
}
_SMALL_FLEET = 8

console = make_console()


def main() -> int:
    started_s = time.perf_counter()
    options = _parse()
    try:
        profile = load_profile(options.profile)
        bases = {title: base.fitted(profile.max_model_len) for title, base in _bases(options)}
    except (ProfileError, TraceError) as error:
        console.print(str(error), markup=False)
        return 1
    here = places(list(bases), options.engines, squeezed=options.squeezed)
    bases |= {title + SQUEEZED: base for title, base in bases.items()}
    promises = Promises(options.ttft_factor, options.tpot_factor)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end the processes of the sweep
    try:
        with Sweep(
            bases,
            profile,
            promises,
            num_gateways=options.gateways,
            window=STEADY,
            num_processes=options.processes,
        ) as sweep:
            knees = _knees(options, sweep, here)
            results, cpu_s = _run(sweep, list(_cases(options, knees)))
    except KeyboardInterrupt:
        console.print("Stopped before the end: nothing is written.")
        return 130
    config = {
        "profile": profile.model_dump(),
        "core": form(),
        "num_gateways": options.gateways,
        "loads_of_the_knee": options.loads or LOADS,
        "variants": options.policies or variants_at_shown_load(),
        "promises": str(promises),
        "num_requests": {num: _num_requests(options, num) for num in options.engines},
        "num_repeats": {num: _num_repeats(options, num) for num in options.engines},
        "counted_part_of_each_run": STEADY,
        "knees_requests_per_s": {_title(place): knee for place, knee in knees.items()},
        "workloads": {key: each.describe() for key, each in bases.items()},
        "wall_s": time.perf_counter() - started_s,
        "cpu_s_of_runs": cpu_s,
        "requests_per_cpu_s": sum(case.num_requests or 0 for case in results) / cpu_s,
    }
    report = Report(options.name, "simulated", options.seed, config)
    Tables(results).fill(report)
    if options.dry:
        report.show(console)
        return 0
    report.finish()
    lines = RESULTS / f"{report.name}.csv"
    _write_csv(results, lines)
    figures = [path.name for path in plot_sweep(lines)]
    console.print(f"Every run: {lines.name}; figures: {', '.join(figures)}")
    return 0


def _bases(options: argparse.Namespace) -> Iterator[tuple[str, Workload]]:
    """Yield each workload as a whole, by its title."""
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
        console.print("No --traces: synthetic workloads instead of the public traces.")
    synthetic = options.synthetic
    if synthetic is None:
        synthetic = [] if found else ["poisson", "bursty", "conversations", "agents"]
    for title, path in found:
        yield title, read_trace(path, options.seed)
    for name in synthetic:
        yield name, SYNTHETIC[name](4 * options.requests, options.seed)


def _num_requests(options: argparse.Namespace, num_engines: int) -> int:
    """Return how many requests a run has: of a large fleet more, though for a shorter time."""
    return options.requests * (2 if num_engines > _SMALL_FLEET else 1)


def _num_repeats(options: argparse.Namespace, num_engines: int) -> int:
    """Return on how many draws each run is repeated: on fewer for a large fleet."""
    return max(1, options.repeats // (2 if num_engines > _SMALL_FLEET else 1))


def _knees(options: argparse.Namespace, sweep: Sweep, here: Sequence[Place]) -> dict[Place, float]:
    """Return the rate at which waits become steep in each place, requests per second."""
    known = {}
    if options.knees is not None:
        known = json.loads(options.knees.read_text())["config"]["knees_requests_per_s"]
    found = {place: known[_title(place)] for place in here if _title(place) in known}
    sought = [place for place in here if place not in found]
    wanted = [
        (
            place.name,
            place.num_engines,
            _num_requests(options, place.num_engines) // 2,
            place.num_copies,
        )
        for place in sought
    ]
    for place, knee in zip(sought, sweep.knees(wanted), strict=True):
        console.print(
            f"{place.name}, {place.num_engines} engines: waits are steep from {knee:.2f} "
            "requests/s on (simulated)"
        )
        found[place] = knee
    return found


def _title(place: Place) -> str:
    return f"{place.name}, {place.num_engines} engines"


def _cases(options: argparse.Namespace, knees: dict[Place, float]) -> Iterator[Case]:
    for place, knee in knees.items():
        yield from cases(
            place,
            knee,
            loads=options.loads,
            variants=options.policies,
            num_requests=_num_requests(options, place.num_engines),
            num_repeats=_num_repeats(options, place.num_engines),
            seed=options.seed,
        )


def _run(sweep: Sweep, cases: Sequence[Case]) -> tuple[Results, float]:
    """Return the figures of all runs, and the CPU seconds that they took."""
    found: Results = {}
    cpu_s = 0.0
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("simulated runs", total=len(cases))
        # The longest runs first, or the last one would run alone.
        for case, figures, case_cpu_s in sweep.run(
            sorted(cases, key=lambda each: -each.num_engines)
        ):
            found[case] = figures
            cpu_s += case_cpu_s
            progress.advance(task)
    return {case: found[case] for case in cases}, cpu_s


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


def _parse() -> argparse.Namespace:
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
        help="with the public traces (docs/simulator.md); default: $HEADWAY_TRACES",
    )
    parser.add_argument("--trace", type=Path, nargs="+", default=[], help="any trace files")
    parser.add_argument(
        "--synthetic",
        nargs="*",
        choices=list(SYNTHETIC),
        default=None,
        help="synthetic workloads beside or instead of traces",
    )
    parser.add_argument(
        "--loads", type=float, nargs="+", help="shares of the knee; default: 0.5, 0.8 and 0.9"
    )
    parser.add_argument(
        "--policies",
        nargs="+",
        metavar="POLICY",
        help="default: ours, rivals on engines as vLLM comes (NAME@stock), ours without each part, "
        "and the clairvoyant reference; headway:hold,order is headway without these two",
    )
    parser.add_argument(
        "--requests", type=int, default=10_000, help="of a run; twice as many on large fleets"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="on requests drawn anew; fewer for large fleets"
    )
    parser.add_argument(
        "--squeezed",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also traces made faster, beside copies of them at their own speed",
    )
    parser.add_argument(
        "--ttft-factor", type=float, default=5.0, help="promised: times that of an idle engine"
    )
    parser.add_argument("--tpot-factor", type=float, default=3.0, help="likewise, per token")
    parser.add_argument(
        "--knees", type=Path, metavar="JSON", help="a result whose knees are taken, not sought anew"
    )
    parser.add_argument("--processes", type=int, help="runs at the same time; default: all cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="sim", help="of the files in benchmarks/results")
    parser.add_argument("--dry", action="store_true", help="show the tables, write nothing")
    options = parser.parse_args()
    for variant in options.policies or ():
        policy, _ = on_stock(variant)
        if policy != clairvoyant.NAME:
            try:
                split(policy)
                warn_renamed(renamed(policy))
            except ValueError as error:
                parser.error(str(error))
    return options


if __name__ == "__main__":
    sys.exit(main())
