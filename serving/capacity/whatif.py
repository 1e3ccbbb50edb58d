"""How many engines does this traffic need for these latency targets, and under which policy?

`headway whatif` asks. Simulated: the deployed router over modelled engines.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from router.simulation.engine.profile import Profile
from router.simulation.figures import Figures, Slo, brief
from router.simulation.variant import policies, renamed, split
from router.simulation.workload.synthetic import SYNTHETIC
from router.simulation.workload.workload import Workload
from serving.capacity.profiles import ProfileError, load_profile
from serving.capacity.sweep import Case, Sweep
from serving.capacity.traces import TraceError, read_trace
from serving.checkout import commit_id
from serving.config import ConfigError
from serving.config.renamed import warn_renamed

_KEY = "traffic"
_PERCENTILES = (50, 90, 99)


class WhatIfError(ConfigError):
    """The question is not valid; the message names the option to change."""


@dataclass(frozen=True)
class Question:
    """The question: traffic, profile and targets."""

    profile: str
    trace: str  # a file, or the name of a made-up workload
    slo: Slo
    percentile: int = 99  # of TTFT and of TPOT: both must be within their targets
    variants: tuple[str, ...] = ()  # none: all policies
    num_engines: int | None = None  # simulated in any case
    max_engines: int = 1024
    rate: float | None = None  # requests per second; unset: as recorded
    num_requests: int = 10_000  # of the trace's beginning
    num_gateways: int = 1
    seed: int = 0


@dataclass
class Search:
    """Bisection for the smallest number of engines that meets the targets under one policy.

    Assumes that more engines never make it worse. States: doubling until the targets are met, then
    halving the gap between the most engines that miss them and the fewest that meet them.
    """

    max_engines: int
    too_few: int = 0
    enough: int | None = None
    tried: dict[int, Figures] = field(default_factory=dict)

    def next(self) -> int | None:
        """Return the number of engines to try next, None when the search is over."""
        if self.enough is None:
            if self.too_few >= self.max_engines:
                return None
            return min(self.max_engines, max(1, 2 * self.too_few))
        if self.enough - self.too_few <= 1:
            return None
        return (self.too_few + self.enough) // 2

    def record_result(self, num_engines: int, figures: Figures, met: bool) -> None:
        """Record the figures of a number of engines, and whether they met the targets."""
        self.tried[num_engines] = figures
        if met:
            self.enough = min(num_engines, self.enough or num_engines)
        else:
            self.too_few = max(num_engines, self.too_few)


def ask(console: Console, *, slo_ttft_s: float, slo_tpot_s: float, **options: Any) -> None:
    """Answer the command line's question; `options` are fields of `Question`."""
    answer(Question(slo=Slo(slo_ttft_s, slo_tpot_s), **options), console)


def answer(question: Question, console: Console) -> dict[str, Search]:
    """Search under each policy, print and return the results. Raises `WhatIfError`."""
    profile, workload, variants = _prepare(question)
    described = workload.describe()
    console.print(
        f"{described['name']}: {len(workload):,} requests at {workload.rate:.2f}/s "
        f"(time scale {workload.scale:.3g}), prompts {described['prompt_tokens_mean']:,.0f} and "
        f"replies {described['output_tokens_mean']:,.0f} tokens on average"
        + (f"; {workload.num_dropped} too long for the model left out" * bool(workload.num_dropped))
    )
    searches = {variant: Search(question.max_engines) for variant in variants}
    with (
        Sweep({_KEY: workload}, profile, question.slo, num_gateways=question.num_gateways) as sweep,
        Progress(console=console, transient=True) as progress,
    ):
        task = progress.add_task("simulating", total=None)
        if question.num_engines is not None:
            _try_fleets(
                sweep, question, workload, dict.fromkeys(variants, question.num_engines), searches
            )
        while wanted := {
            variant: number
            for variant, search in searches.items()
            if (number := search.next()) is not None
        }:
            numbers = ", ".join(map(str, sorted(set(wanted.values()))))
            progress.update(task, description=f"simulating {numbers} engines")
            _try_fleets(sweep, question, workload, wanted, searches)
    _show(question, profile, searches, console)
    return searches


def _prepare(question: Question) -> tuple[Profile, Workload, tuple[str, ...]]:
    variants = question.variants or tuple(policies())
    if question.percentile not in _PERCENTILES:
        known = ", ".join(map(str, _PERCENTILES))
        raise WhatIfError(f"--percentile {question.percentile}: one of {known}")
    try:
        for variant in variants:
            split(variant)
            warn_renamed(renamed(variant))
        profile = load_profile(question.profile)
        if question.trace in SYNTHETIC and not Path(question.trace).exists():
            workload = SYNTHETIC[question.trace](question.num_requests, question.seed)
        else:
            workload = read_trace(Path(question.trace), question.seed)
        workload = workload.fitted(profile.max_model_len).part(0, question.num_requests)
        if question.rate is not None:
            workload = workload.at_rate(question.rate)
    except (ProfileError, TraceError) as error:
        raise WhatIfError(str(error)) from None
    except ValueError as error:
        raise WhatIfError(str(error)) from None
    return profile, workload, variants


def _try_fleets(
    sweep: Sweep,
    question: Question,
    workload: Workload,
    wanted: dict[str, int],
    searches: dict[str, Search],
) -> None:
    cases = [
        Case(_KEY, num_engines, math.nan, workload.rate, variant, 0, question.seed)
        for variant, num_engines in wanted.items()
    ]
    for case, figures in zip(cases, sweep.figures(cases), strict=True):
        searches[case.variant].record_result(
            case.num_engines, figures, _meets_targets(question, figures)
        )


def _meets_targets(question: Question, figures: Figures) -> bool:
    """Whether both percentiles are within their targets and every request completed."""
    ttft_s = figures[f"ttft_p{question.percentile}_s"]
    tpot_s = figures[f"tpot_p{question.percentile}_s"]
    assert question.slo.ttft_s is not None
    return (
        figures["completed"] == 1.0
        and ttft_s <= question.slo.ttft_s
        and not tpot_s > question.slo.tpot_s  # nan: replies of one token have none
    )


def _show(
    question: Question, profile: Profile, searches: dict[str, Search], console: Console
) -> None:
    percent = question.percentile
    counts = sorted({number for search in searches.values() for number in search.tried})
    table = Table(
        title=f"simulated: p{percent} of TTFT / of TPOT, s; * meets the targets ({question.slo})",
        title_justify="left",
    )
    table.add_column("policy")
    for number in counts:
        table.add_column(f"{number} engine{'s' * (number != 1)}", justify="right")
    for variant, search in searches.items():
        table.add_row(
            variant,
            *(
                _cell(question, search.tried[number]) if number in search.tried else ""
                for number in counts
            ),
        )
    console.print(table)
    for variant, search in sorted(searches.items(), key=lambda each: each[1].enough or math.inf):
        found = f"{search.enough} engines" if search.enough else f"not even {question.max_engines}"
        console.print(f"{variant}: {found}")
    revision = (commit_id() or "not in a checkout")[:12]
    console.print(
        f"Simulated, not measured: profile {profile.name} ({profile.device}, {profile.model}), "
        f"seed {question.seed}, commit {revision}. {profile.source}",
        style="dim",
    )


def _cell(question: Question, figures: Figures) -> str:
    percent = question.percentile
    times = " / ".join(brief(figures[f"{name}_p{percent}_s"]) for name in ("ttft", "tpot"))
    shed = figures["num_shed"]
    return f"{times}{' *' * _meets_targets(question, figures)}" + f", {shed:,.0f} shed" * bool(shed)
