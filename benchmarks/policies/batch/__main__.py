"""What do batches do to interactive requests, and how many tokens do they add? Simulated.

    python -m benchmarks.policies.batch

Interactive requests come at a steady mean rate, with and without a batch beside them that always
has more lines; the same requests both times. How many lines are open is the deployed rule's to say
(`serving.gateway.http.endpoints.batch.pace`).
"""

import argparse
import sys
from multiprocessing import get_context

from rich.progress import track

from benchmarks.policies.batch.runs import FIGURES, PROMPTS, REPLIES, Figures, capacity, simulate
from benchmarks.report.console import make_console
from benchmarks.report.report import Report, Spread
from serving.capacity.profiles import ProfileError, load_profile
from serving.config.batch import BatchConfig

_MAX_CHANGE = 5.0  # percent, of interactive p99


def main() -> int:
    options = _parse()
    console = make_console()
    try:
        profile = load_profile(options.profile)
    except ProfileError as error:
        console.print(str(error), markup=False)
        return 1
    cases: list[tuple[float, float | None]] = [
        (load, slowdown) for load in options.loads for slowdown in (None, *options.slowdowns)
    ]
    config = {
        "profile": profile.model_dump(),
        "num_engines": options.engines,
        "num_requests": options.requests,
        "num_repeats": options.repeats,
        "loads": options.loads,
        "slowdowns": options.slowdowns,
        "lines": {"prompts": str(PROMPTS), "replies": str(REPLIES)},
    }
    report = Report(options.name, "simulated", options.seed, config)
    seeds = range(options.seed, options.seed + options.repeats)
    found: dict[tuple[float, float | None], list[Figures]] = {}
    with get_context("forkserver").Pool(options.processes) as pool:
        capacities = pool.map(capacity, [(options, seed) for seed in seeds])
        report.config["capacity_requests_per_s"] = capacities
        jobs = [
            (options, load * capacities[seed - options.seed], slowdown, seed)
            for load, slowdown in cases
            for seed in seeds
        ]
        results = pool.imap(simulate, jobs)
        for case in track(cases, "simulated runs", console=console):
            found[case] = [next(results) for _ in seeds]
    for (load, slowdown), runs in found.items():
        _add_rows(report, load, slowdown, runs, found[load, None], options)
    report.add_note(
        "Simulated: the deployed router and the deployed rule of how many lines are open, over "
        "modelled engines. Changes are against the same requests without a batch, by seed. Lines: "
        "prompts of 500 and replies of 200 tokens in the median. A load is a share of the requests "
        "per second that the engines complete when all are there at once."
    )
    if options.dry:
        report.show(console)
    else:
        report.finish()
    return 0


def _add_rows(
    report: Report,
    load: float,
    slowdown: float | None,
    runs: list[Figures],
    without: list[Figures],
    options: argparse.Namespace,
) -> None:
    name = "no batch" if slowdown is None else f"batch.max_slowdown {slowdown:g}"
    title = f"interactive load {load:.0%}, {options.engines} engines, simulated"
    figures = {key: Spread.of([run[key] for run in runs]) for key in runs[0]}
    report.add_row(title, batch=name, **figures)
    if slowdown is None:
        return
    changes = {
        key: Spread.of(
            [100.0 * (run[key] / base[key] - 1.0) for run, base in zip(runs, without, strict=True)]
        )
        for key in (*(f"{each}_p99" for each in FIGURES), "output_tokens_per_s")
    }
    report.add_row(f"changes, percent: {title}", batch=name, **changes)
    if slowdown != BatchConfig().max_slowdown:
        return
    for each in FIGURES:
        target = f"interactive {each} p99, change in percent, load {load:.0%}"
        report.add_target(target, changes[f"{each}_p99"], f"<= {_MAX_CHANGE:g}")
    target = f"output tokens/s, change in percent, load {load:.0%}"
    report.add_target(target, changes["output_tokens_per_s"], "> 0")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="h100-llama8b", help="a profile's name or file")
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--requests", type=int, default=10_000, help="interactive ones, per run")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.15, 0.3, 0.5])
    parser.add_argument("--slowdowns", type=float, nargs="+", default=[0.05])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="batch", help="of the file in benchmarks/results")
    parser.add_argument("--dry", action="store_true", help="show the tables, write nothing")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
