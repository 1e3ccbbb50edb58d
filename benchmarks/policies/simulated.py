"""Which policy is best on fleets that we do not have? Simulated.

    python -m benchmarks.policies.simulated

The deployed router over simulated engines in virtual time: each workload, fleet and load, beside a
clairvoyant reference. Nothing is measured on hardware, and every figure says "simulated".
"""

import argparse
import csv
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

from benchmarks.policies.simulated_tables import Results, Tables
from benchmarks.report.plot_sweep import plot_sweep
from benchmarks.report.report import RESULTS, Report
from router.simulation import clairvoyant
from router.simulation.engine.profile import Profile
from router.simulation.figures import Slo
from router.simulation.variant import ablations, policies, renamed, split
from router.simulation.workload.synthetic import SYNTHETIC
from router.simulation.workload.workload import Workload
from serving.capacity.profiles import ProfileError, load_profile
from serving.capacity.sweep import Case, Sweep
from serving.capacity.traces import TraceError, read_trace
from serving.config.renamed import warn_renamed

# File names of the public traces: as published, and likely ones.
TRACES = {
    "azure-code": ("*azure*code*",),
    "azure-conversation": ("*azure*conv*",),
    "mooncake": ("*mooncake*conv*", "conversation_trace*"),
    "servegen": ("*servegen*m-large*", "*servegen*", "*m-large*"),
}
# A fleet of this size gets a trace as it is; a larger one gets copies laid over each other.
_ENGINES_PER_COPY = 8
_LOADS = (0.5, 0.7, 0.8, 0.9, 0.95)
# For larger fleets: the time of a run grows with the number of its requests.
_LOADS_OF_LARGE = (0.5, 0.8, 0.95)
# A run has --requests, or so many tokens if those are fewer requests. The time of a run grows with
# the time that it covers, and where prompts are long there are few requests in that time.
_TOKENS_PER_RUN = 6_000_000
# The capacity is simulated on so many engines, with requests for so many times their KV caches.
# With fewer requests the engines would still be filling up, and decode little, while it counts.
_ENGINES_FOR_CAPACITY = 2
_FILLS_FOR_CAPACITY = 5

console = Console(highlight=False)


def main() -> int:
    started_s = time.perf_counter()
    options = _parse()
    try:
        profile = load_profile(options.profile)
        bases = {title: base.fitted(profile.max_model_len) for title, base in _bases(options)}
        parts = {title: _saturating(base, profile) for title, base in bases.items()}
        workloads = dict(_workloads(options, bases))
    except (ProfileError, TraceError) as error:
        console.print(str(error), markup=False)
        return 1
    slo = Slo(options.slo_ttft, options.slo_tpot)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end the processes of the sweep
    try:
        with Sweep(parts | workloads, profile, slo, num_gateways=options.gateways) as sweep:
            capacities = _capacities(options, sweep, list(bases))
            results, cpu_s = _run(sweep, list(_cases(options, list(workloads), capacities)))
    except KeyboardInterrupt:
        console.print("Stopped before the end: nothing is written.")
        return 130
    config = {
        "profile": profile.model_dump(),
        "num_gateways": options.gateways,
        "loads": options.loads or {"small": _LOADS, "large": _LOADS_OF_LARGE},
        "variants": options.policies,
        "slo": str(slo),
        "num_repeats": {num: _num_repeats(options, num) for num in options.engines},
        "capacities_requests_per_s": {
            f"{name}, {num_engines} engines": capacity
            for (name, num_engines), capacity in capacities.items()
        },
        "workloads": {key: each.describe() for key, each in workloads.items()},
        "wall_s": time.perf_counter() - started_s,
        "cpu_s_of_runs": cpu_s,
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
        synthetic = [] if found else ["poisson", "bursty", "conversations"]
    for title, path in found:
        yield title, read_trace(path, options.seed)
    for name in synthetic:
        yield name, SYNTHETIC[name](4 * options.requests, options.seed)


def _workloads(
    options: argparse.Namespace, bases: dict[str, Workload]
) -> Iterator[tuple[str, Workload]]:
    """Yield the part of each workload for each fleet and repeat, by its key.

    For a large fleet, the parts that are laid over one another are a third as long: it has plenty
    of requests, and they cost time.
    """
    for title, base in bases.items():
        for num_engines in options.engines:
            num_copies = max(1, num_engines // _ENGINES_PER_COPY)
            num_requests = _num_requests(options, base) // min(3, num_copies)
            for repeat in range(_num_repeats(options, num_engines)):
                part = base.part(repeat, num_requests).overlaid(num_copies)
                yield f"{title}/{num_engines}/{repeat}", part


def _saturating(base: Workload, profile: Profile) -> Workload:
    """Return as much of a workload's beginning as keeps a few engines full for long."""
    left = _FILLS_FOR_CAPACITY * _ENGINES_FOR_CAPACITY * profile.num_kv_tokens
    for number, each in enumerate(base.arrivals, start=1):
        left -= each.num_prompt_tokens + each.num_output_tokens
        if left <= 0:
            return base.part(0, number)
    return base


def _num_requests(options: argparse.Namespace, workload: Workload) -> int:
    """Return how many requests of a workload a run of 8 engines has."""
    num_tokens = sum(each.num_prompt_tokens + each.num_output_tokens for each in workload.arrivals)
    return min(options.requests, round(_TOKENS_PER_RUN * len(workload) / num_tokens))


def _num_repeats(options: argparse.Namespace, num_engines: int) -> int:
    """Return how many parts each run is repeated on: fewer for a large fleet."""
    return max(1, options.repeats // max(1, num_engines // _ENGINES_PER_COPY))


def _capacities(
    options: argparse.Namespace, sweep: Sweep, titles: Sequence[str]
) -> dict[tuple[str, int], float]:
    """Return the capacity of each (workload, fleet), in proportion to that of a few engines."""
    found = {}
    wanted = [(title, _ENGINES_FOR_CAPACITY) for title in titles]
    for title, capacity in zip(titles, sweep.capacities(wanted), strict=True):
        each = capacity / _ENGINES_FOR_CAPACITY
        console.print(f"{title}: an engine carries {each:.2f} requests/s (simulated)")
        for num_engines in options.engines:
            found[title, num_engines] = each * num_engines
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
        "--requests", type=int, default=1500, help="of a run of 8 engines; more on more engines"
    )
    parser.add_argument(
        "--repeats", type=int, default=2, help="on successive parts; fewer for large fleets"
    )
    parser.add_argument("--slo-ttft", type=float, help="s; default: the router's own target")
    parser.add_argument("--slo-tpot", type=float, default=0.05, help="s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="sim", help="of the files in benchmarks/results")
    parser.add_argument("--dry", action="store_true", help="show the tables, write nothing")
    options = parser.parse_args()
    for variant in options.policies:
        if variant != clairvoyant.NAME:
            try:
                split(variant)
                warn_renamed(renamed(variant))
            except ValueError as error:
                parser.error(str(error))
    return options


if __name__ == "__main__":
    sys.exit(main())
