"""What do batches do to interactive requests, and how many tokens do they add? Simulated.

    python -m benchmarks.batch

Interactive requests come at a steady mean rate, with and without a batch beside them that always
has more lines; the same requests both times. How many lines are open is the deployed rule's to say
(`serving.gateway.batch.pace`).
"""

import argparse
import sys
from dataclasses import replace
from multiprocessing import get_context

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks.batch.beside import BesideBatch, Scenario
from benchmarks.report.report import Report, Spread
from router import RequestClass
from router.simulation.workload.lengths import LogNormal
from router.simulation.workload.synthetic import poisson
from router.simulation.workload.workload import Workload
from serving.capacity.profiles import ProfileError, load_profile
from serving.capacity.sweep import Fleet, simulated_capacity
from serving.config.batch import BatchConfig

_PROMPTS = LogNormal(500.0, 0.8, high=8_000)  # of a line
_REPLIES = LogNormal(200.0, 0.8, high=2_000)
_WARM = 0.1  # of a run, which fills empty engines, is left out
_FIGURES = ("ttft_s", "tpot_s", "e2e_s")
_MAX_CHANGE = 5.0  # percent, of interactive p99

Figures = dict[str, float]


def interactive(name: str, load: float, num_requests: int, num_engines: int, seed: int) -> Workload:
    """Return questions and documents of class interactive at a share of what engines carry."""
    profile = load_profile(name)
    workload = poisson(num_requests, seed).fitted(profile.max_model_len)
    rate = load * simulated_capacity(workload, Fleet(profile, num_engines), seed)
    arrivals = (
        msgspec.structs.replace(each, priority_class=RequestClass.INTERACTIVE)
        for each in workload.at_rate(rate).arrivals
    )
    return replace(workload.at_rate(rate), arrivals=tuple(arrivals))


def simulate(job: tuple[argparse.Namespace, float, float | None, int]) -> Figures:
    """Return the figures of one run. `job`: options, load, max_slowdown (None: no batch), seed."""
    options, load, max_slowdown, seed = job
    workload = interactive(options.profile, load, options.requests, options.engines, seed)
    scenario = Scenario(
        load_profile(options.profile), options.engines, max_slowdown, None, _PROMPTS, _REPLIES
    )
    beside = BesideBatch(workload, scenario, seed)
    run = beside.run()
    is_interactive = run.priority_class == RequestClass.INTERACTIVE.value
    counted = run.completed & is_interactive & (run.arrival_s >= _WARM * workload.duration_s)
    late = run.completed & (run.end_s >= _WARM * workload.duration_s)
    figures = {
        f"{name}_p{percent}": float(np.nanpercentile(getattr(run, name)[counted], percent))
        for name in _FIGURES
        for percent in (50, 99)
    }
    tokens_per_s = run.num_output_tokens[late].sum() / ((1.0 - _WARM) * workload.duration_s)
    figures["output_tokens_per_s"] = float(tokens_per_s)
    figures["lines"] = float((run.completed & ~is_interactive).sum())
    figures["lines_open_p50"] = float(np.median(beside.limits)) if beside.limits else 0.0
    return figures


def main() -> int:
    options = _parse()
    console = Console(highlight=False)
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
        "lines": {"prompts": str(_PROMPTS), "replies": str(_REPLIES)},
    }
    report = Report(options.name, "simulated", options.seed, config)
    seeds = range(options.seed, options.seed + options.repeats)
    jobs = [(options, load, slowdown, seed) for load, slowdown in cases for seed in seeds]
    found: dict[tuple[float, float | None], list[Figures]] = {}
    with get_context("forkserver").Pool(options.processes) as pool:
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
        for key in (*(f"{each}_p99" for each in _FIGURES), "output_tokens_per_s")
    }
    report.add_row(f"changes, percent: {title}", batch=name, **changes)
    if slowdown != BatchConfig().max_slowdown:
        return
    for each in _FIGURES:
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
    parser.add_argument("--slowdowns", type=float, nargs="+", default=[0.05, 0.2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="batch", help="of the file in benchmarks/results")
    parser.add_argument("--dry", action="store_true", help="show the tables, write nothing")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
