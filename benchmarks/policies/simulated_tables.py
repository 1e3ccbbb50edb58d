"""What do the simulated runs show, and where does Headway lose?"""

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from statistics import fmean, stdev

from scipy.stats import t as student

from benchmarks.policies.simulated_grid import SHOWN_LOAD
from benchmarks.report.report import Figure, Report
from router.simulation import clairvoyant
from router.simulation.figures import Figures, interval, knee
from router.simulation.variant import OURS, on_stock, policies
from serving.capacity.sweep import Case

Results = dict[Case, Figures]

# All figures are shown at the highest load up to this.
_SHOWN = {  # column: (figure, factor)
    "p50": ("ttft_p50_s", 1.0),
    "p99": ("ttft_p99_s", 1.0),
    "short_p50": ("short_ttft_p50_s", 1.0),
    "short_p99": ("short_ttft_p99_s", 1.0),
    "long_p50": ("long_ttft_p50_s", 1.0),
    "long_p99": ("long_ttft_p99_s", 1.0),
    "itl_p99_ms": ("itl_p99_s", 1e3),
    "tpot_p99_ms": ("tpot_p99_s", 1e3),
    "e2e_mean": ("e2e_mean_s", 1.0),
    "e2e_p99": ("e2e_p99_s", 1.0),
    "slowdown_p50": ("slowdown_p50", 1.0),
    "slowdown_p99": ("slowdown_p99", 1.0),
    "goodput": ("goodput", 1.0),
    "prefix_hits": ("prefix_hit_share", 1.0),
    "refused": ("refused", 1.0),
    "hold_mean_ms": ("hold_mean_s", 1e3),
    "tokens/s": ("output_tokens_per_s", 1.0),
    "preempted": ("num_preemptions", 1.0),
}
_JUDGED = {  # figure: less is better
    "ttft_p50_s": True,
    "ttft_p99_s": True,
    "short_ttft_p99_s": True,
    "long_ttft_p99_s": True,
    "itl_p99_s": True,
    "tpot_p99_s": True,
    "e2e_mean_s": True,
    "slowdown_p99": True,
    "goodput": False,
    "refused": True,
}
# What is asked of ours, over the best rival on engines as vLLM comes: at most, or at least.
_WANTED = {
    "ttft_p50_s": 1.02,
    "ttft_p99_s": 1.0,
    "short_ttft_p50_s": 1.02,
    "short_ttft_p99_s": 0.8,
    "long_ttft_p99_s": 1.05,
    "itl_p99_s": 1.0,
    "tpot_p99_s": 1.0,
    "e2e_mean_s": 1.02,
    "e2e_p99_s": 1.02,
    "slowdown_p50": 1.02,
    "slowdown_p99": 1.0,
    "goodput": 1.0,
    "prefix_hit_share": 1.0,
}
_MORE_IS_BETTER = ("goodput", "prefix_hit_share")
# Of one policy over another, run by run.
_COMPARED = (
    "ttft_p50_s",
    "ttft_p99_s",
    "short_ttft_p99_s",
    "long_ttft_p99_s",
    "itl_p99_s",
    "e2e_mean_s",
    "goodput",
    "prefix_hit_share",
)
# Headway loses where another policy is better by more than this share.
_NOISE = 0.05


class Tables:
    """Means over the repeats of runs with the same workload, fleet, load and variant."""

    def __init__(self, results: Results) -> None:
        self._by_place: dict[tuple[str, int, float, str], list[Figures]] = {}
        self._by_repeat: dict[tuple[str, int, float, str], dict[int, Figures]] = {}
        for case, figures in results.items():
            place = (case.workload.partition("/")[0], case.num_engines, case.load, case.variant)
            self._by_place.setdefault(place, []).append(figures)
            self._by_repeat.setdefault(place, {})[case.repeat] = figures

    @cached_property
    def _groups(self) -> dict[tuple[str, int], list[float]]:
        """The loads of each workload and fleet, ascending."""
        groups: dict[tuple[str, int], set[float]] = {}
        for title, num_engines, load, _ in self._by_place:
            groups.setdefault((title, num_engines), set()).add(load)
        return {group: sorted(loads) for group, loads in groups.items()}

    @cached_property
    def _variants(self) -> list[str]:
        return list(dict.fromkeys(variant for *_, variant in self._by_place))

    def fill(self, report: Report) -> None:
        """Add all tables to the report."""
        for (title, num_engines), loads in self._groups.items():
            self._add_details(report, title, num_engines, loads)
            if len(loads) > 1:
                self._add_loads(report, title, num_engines, loads)
        for row in self.ratios():
            report.add_row("Ours over the best rival on engines as vLLM comes (simulated)", **row)
        for row in self.comparisons():
            report.add_row("Ours over each of the others, run by run (simulated)", **row)
        for row in self.losses():
            report.add_row("Where headway loses (simulated), by more than 5 %", **row)
        report.add_note(
            "Load: share of the rate from which waits are steep, where under least_requests on "
            "engines as vLLM comes the p99 of TTFT is three times that at a small load; found by "
            f"search for each trace and fleet. Goodput: {report.config['promises']}. Slowdown: "
            "the time to the last token over that on an idle engine. Short: the lower half of the "
            "prompts by size; long: the upper tenth. The first and the last tenth of each run do "
            "not count. In brackets: 95 % bootstrap interval of the mean over repeats."
        )
        report.add_note(
            "@stock: over engines as vLLM comes (first come, first served, prompts in chunks of a "
            "whole step); else over engines as Headway sets them. Traces are copies laid over one "
            "another at their own speed, or, squeezed, one copy made faster."
        )

    def ratios(self) -> Iterator[dict[str, Figure]]:
        """Yield a row for each workload, fleet and load: ours over the best rival's, by figure.

        The best is another one for each figure, so that no rival may be all of them at once.
        `missed` counts the figures in which ours is not what is wanted (`_WANTED`).
        """
        rivals = [name for name in self._variants if _is_rival(name) and on_stock(name)[1]]
        for (title, num_engines), loads in self._groups.items():
            for load in loads:
                row: dict[str, Figure] = {
                    "workload": title,
                    "engines": str(num_engines),
                    "load": f"{load:.0%}",
                }
                num_missed = 0
                for figure, wanted in _WANTED.items():
                    ours = self._mean((title, num_engines, load, OURS), figure)
                    theirs = [
                        self._mean((title, num_engines, load, each), figure) for each in rivals
                    ]
                    theirs = [value for value in theirs if value > 0.0]
                    if not theirs or math.isnan(ours):
                        continue
                    is_more = figure in _MORE_IS_BETTER
                    ratio = ours / (max if is_more else min)(theirs)
                    row[figure.removesuffix("_s")] = ratio
                    num_missed += ratio < wanted if is_more else ratio > wanted
                if len(row) > 3:
                    yield {**row, "missed": num_missed}

    def comparisons(self) -> Iterator[dict[str, Figure]]:
        """Yield a row for each workload, fleet, load and other variant: ours over it, by figure.

        Both had the same requests in each run, so it is the ratio of the two that is averaged:
        geometric mean and its 95 % interval over the repeats (Student's t).
        """
        for (title, num_engines), loads in self._groups.items():
            for load in loads:
                ours = self._by_repeat.get((title, num_engines, load, OURS), {})
                for variant in self._variants:
                    others = self._by_repeat.get((title, num_engines, load, variant), {})
                    both = [repeat for repeat in ours if repeat in others]
                    if variant == OURS or not both:
                        continue
                    row: dict[str, Figure] = {
                        "workload": title,
                        "engines": str(num_engines),
                        "load": f"{load:.0%}",
                        "over": variant,
                        "runs": len(both),
                    }
                    for figure in _COMPARED:
                        pairs = [
                            (ours[each].get(figure, 0.0), others[each].get(figure, 0.0))
                            for each in both
                        ]
                        if ratio := _ratio(pairs):
                            row[figure.removesuffix("_s")] = ratio
                    yield row

    def losses(self) -> Iterator[dict[str, Figure]]:
        """Yield a row for each workload, fleet and figure in which another policy is better.

        The row is of the load with the largest factor, and names all loads that are lost.
        """
        rivals = [name for name in self._variants if _is_rival(name)]
        if OURS not in self._variants or not rivals:
            return
        for (title, num_engines), loads in self._groups.items():
            for figure, less in _JUDGED.items():
                lost: dict[float, tuple[float, str]] = {}  # by load: by what factor, to whom
                for load in loads:
                    values = {
                        name: self._mean((title, num_engines, load, name), figure)
                        for name in (OURS, *rivals)
                        if (title, num_engines, load, name) in self._by_place
                    }
                    here = [name for name in rivals if not math.isnan(values.get(name, math.nan))]
                    if not here or OURS not in values:
                        continue
                    best = (min if less else max)(here, key=lambda name: values[name])
                    one, other = values[OURS], values[best]
                    if min(one, other) <= 0.0:
                        continue  # none was refused: what is none is told in the tables
                    factor = one / other if less else other / one
                    if factor > 1.0 + _NOISE:
                        lost[load] = factor, best
                if not lost:
                    continue
                worst = max(lost, key=lambda load: lost[load])
                factor, best = lost[worst]
                yield {
                    "workload": title,
                    "engines": str(num_engines),
                    "figure": figure,
                    "at_loads": ", ".join(f"{load:.0%}" for load in lost),
                    "worst_at": f"{worst:.0%}",
                    OURS: self._spread((title, num_engines, worst, OURS), figure),
                    "best_other": best,
                    "its": self._spread((title, num_engines, worst, best), figure),
                    "factor": factor,
                    clairvoyant.NAME: self._known(
                        (title, num_engines, worst, clairvoyant.NAME), figure
                    ),
                }

    def _add_details(
        self, report: Report, title: str, num_engines: int, loads: list[float]
    ) -> None:
        shown = max((load for load in loads if load <= SHOWN_LOAD), default=loads[0])
        for variant in self._variants:
            place = (title, num_engines, shown, variant)
            if place not in self._by_place:
                continue
            row: dict[str, Figure] = {"policy": variant}
            for column, (figure, factor) in _SHOWN.items():
                value = self._known(place, figure)
                row[column] = None if value is None else factor * value
                if column == "p99" and len(self._by_place[place]) > 1:
                    row["p99_95%"] = self._interval(place, figure)
            report.add_row(
                f"{title}, {num_engines} engines, {shown:.0%} load, simulated: TTFT and more, s",
                **row,
            )

    def _add_loads(self, report: Report, title: str, num_engines: int, loads: list[float]) -> None:
        for variant in self._variants:
            if any((title, num_engines, load, variant) not in self._by_place for load in loads):
                continue  # it was looked at where the details are
            p99_s, goodput = (
                [self._mean((title, num_engines, load, variant), figure) for load in loads]
                for figure in ("ttft_p99_s", "goodput")
            )
            row: dict[str, Figure] = {"policy": variant}
            row |= {
                f"p99_{load:.0%}": _known(each) for load, each in zip(loads, p99_s, strict=True)
            }
            row["knee"] = knee(loads, p99_s)
            row |= {
                f"goodput_{load:.0%}": _known(each)
                for load, each in zip(loads, goodput, strict=True)
            }
            report.add_row(f"{title}, {num_engines} engines, simulated: over the load", **row)

    def _mean(self, place: tuple[str, int, float, str], figure: str) -> float:
        known = [each[figure] for each in self._by_place.get(place, ())]
        known = [value for value in known if not math.isnan(value)]
        return fmean(known) if known else math.nan

    def _known(self, place: tuple[str, int, float, str], figure: str) -> float | None:
        return _known(self._mean(place, figure))

    def _interval(self, place: tuple[str, int, float, str], figure: str) -> str:
        low, high = interval([each[figure] for each in self._by_place[place]])
        return f"{low:.3g} to {high:.3g}"

    def _spread(self, place: tuple[str, int, float, str], figure: str) -> str:
        mean = f"{self._mean(place, figure):.3g}"
        if len(self._by_place[place]) < 2:
            return mean
        return f"{mean} [{self._interval(place, figure)}]"


def _ratio(pairs: Sequence[tuple[float, float]]) -> str | None:
    """Return the geometric mean of ratios and its 95 % interval; None if any is of nothing."""
    if not all(one > 0.0 and other > 0.0 for one, other in pairs):
        return None
    logs = [math.log(one / other) for one, other in pairs]
    mean = fmean(logs)
    if len(logs) < 2:
        return f"{math.exp(mean):.2f}"
    error = stdev(logs) / math.sqrt(len(logs))
    half = float(student.ppf(0.975, len(logs) - 1)) * error
    return f"{math.exp(mean):.2f} [{math.exp(mean - half):.2f} to {math.exp(mean + half):.2f}]"


def _is_rival(variant: str) -> bool:
    """Whether it is another policy, over whatever engines."""
    name, _ = on_stock(variant)
    return name in policies() and name != OURS


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
