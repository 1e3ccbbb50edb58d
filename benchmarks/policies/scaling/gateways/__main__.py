"""What do several gateways cost in time to first token? Simulated.

    python -m benchmarks.policies.scaling.gateways

The same requests before the same engines, with one gateway and with more: questions and documents
that come independently (`poisson`) and in bursts (`bursty`), and conversations, whose turns come to
any gateway. Beside it what it is without the engines' gate, and without that and with others'
bookings only in the next snapshot.
"""

import argparse
import sys

from rich.progress import track

from benchmarks.policies.scaling.gateways.runs import PROFILE, Case, run
from benchmarks.report.console import make_console
from benchmarks.report.report import Report, Spread

_MAX_CHANGE = 10.0  # percent, of p99, of most gateways over one
# Workload, engines, requests of each and per second, and how it may be: by all of `--gateways`, or
# by one and the most.
_FLEETS: tuple[tuple[str, int, int, float, tuple[str, ...]], ...] = (
    ("poisson", 8, 625, 32.5, ("without the gate", "without both")),
    ("poisson", 64, 250, 32.5, ("without the gate", "without both")),
    ("poisson", 512, 60, 32.5, ("without both",)),
    ("bursty", 8, 625, 24.0, ("without the gate", "without both")),
    ("conversations", 64, 100, 8.0, ("without both",)),
)
_LARGE = (1000, 16, 40)  # engines, gateways, requests of each engine


def main() -> int:
    options = _parse()
    console = make_console()
    config = vars(options) | {"profile": PROFILE, "fleets": _FLEETS, "large": _LARGE}
    report = Report(options.name, "simulated", options.seeds[0], config)
    cases = []
    for workload, num_engines, num_requests, rate, hows in _FLEETS:
        if num_engines > options.max_engines:
            continue
        kinds = [("as shipped", number) for number in options.gateways]
        kinds += [(how, max(options.gateways)) for how in hows]
        cases += [
            Case(workload, num_engines, number, num_requests, rate, seed, how)
            for how, number in kinds
            for seed in options.seeds
        ]
    num_large, most, num_requests = _LARGE
    if num_large <= options.max_engines:
        cases += [
            Case("poisson", num_large, number, num_requests, 32.5, options.seeds[0])
            for number in (1, most)
        ]
        cases.append(Case("conversations", num_large, most, num_requests, 8.0, options.seeds[0]))
    found: dict[Case, dict[str, float]] = {}
    for case in track(cases, "simulated runs", console=console):
        found[case] = run(case)
    _add_tables(report, found)
    report.add_note(
        "Simulated: the deployed router over modelled engines, `serving.capacity.sweep`; each "
        "connection's gateway is drawn. Changes are against one gateway with the same requests, by "
        "seed. 512 and more engines have fewer requests each, so their runs begin emptier."
    )
    if options.dry:
        report.show(console)
    else:
        report.finish()
    return 0


def _add_tables(report: Report, found: dict[Case, dict[str, float]]) -> None:
    groups: dict[tuple[str, int, float, str, int], list[Case]] = {}
    for case in found:
        key = (case.workload, case.num_engines, case.rate_per_engine, case.how, case.num_gateways)
        groups.setdefault(key, []).append(case)
    for (workload, num_engines, rate, how, num_gateways), cases in groups.items():
        runs = [found[case] for case in cases]
        bases = [_base(found, case) for case in cases]
        figures = {name: Spread.of([each[name] for each in runs]) for name in runs[0]}
        changes = {
            f"{name}_change_percent": Spread.of(
                [
                    100.0 * (one[name] / base[name] - 1.0)
                    for one, base in zip(runs, bases, strict=True)
                ]
            )
            for name in ("ttft_p99_ms", "ttft_mean_ms", "short_ttft_p99_ms")
            if all(bases)
        }
        title = f"{workload}, {num_engines} engines, {rate * num_engines:g} requests/s"
        report.add_row(title, gateways=str(num_gateways), how=how, **changes, **figures)
        if how == "as shipped" and num_gateways == 8 and changes:
            name = f"TTFT p99 of 8 gateways over 1, percent, {title}"
            report.add_target(name, changes["ttft_p99_ms_change_percent"], f"<= {_MAX_CHANGE:g}")


def _base(found: dict[Case, dict[str, float]], case: Case) -> dict[str, float]:
    """Return the run of the same requests through one gateway; empty if there is none."""
    for other, figures in found.items():
        if other.num_gateways == 1 and (
            other.workload,
            other.num_engines,
            other.rate_per_engine,
            other.seed,
        ) == (case.workload, case.num_engines, case.rate_per_engine, case.seed):
            return figures
    return {}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gateways", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[41, 42, 43])
    parser.add_argument("--max-engines", type=int, default=1000, help="of the fleets, up to these")
    parser.add_argument("--name", default="gateways", help="of the file in benchmarks/results")
    parser.add_argument("--dry", action="store_true", help="show the tables, write nothing")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
