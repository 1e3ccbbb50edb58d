"""What would it be worth to know how long answers will be? Use by use, simulated.

    python -m benchmarks.policies.length_value --traces DIR [--dry]

The deployed router in steady state, each time told something else for one use and what it has
learned by itself for the others: nothing (a constant), the mean that it learns, the distribution
of a good predictor, and the true length. The good predictor is drawn: the true length, blurred
until it ranks answers with a Kendall tau of 0.5, and then calibrated: as good as a text model,
though the traces have no text.

What is only told (when an answer ends, when an engine is drained, what a provider asks) is compared
with what came, everything but the length being known.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import numpy as np
from scipy.stats import kendalltau

from benchmarks.report.console import make_console
from benchmarks.report.report import Report
from router import Request
from router.estimators.lengths.forecast import Lengths
from router.estimators.lengths.given import GivenLengths
from router.estimators.lengths.predicted import PredictedLengths
from router.estimators.lengths.text_model import TextModel
from router.estimators.output_length import PRIOR_TOKENS, OutputLengths
from router.simulation.engine.profile import Profile
from router.simulation.engine.unloaded import UnloadedTimes
from router.simulation.figures import STEADY, Figures, Promises, figures_of, interval
from router.simulation.workload.synthetic import SYNTHETIC
from router.simulation.workload.workload import Workload
from serving.capacity.profiles import load_profile
from serving.capacity.sweep import Fleet, simulate, simulated_capacity
from serving.capacity.traces import read_trace

_TAU = 0.5
_NUM_BINS = 24
_LIMIT = 4096  # a usual `max_tokens`, of clients that set one because they have to
_SHOWN = (
    ("ttft_mean_s", "TTFT mean"),
    ("ttft_p99_s", "TTFT p99"),
    ("tpot_mean_s", "TPOT mean"),
    ("e2e_mean_s", "whole answer, mean"),
    ("output_tokens_per_s", "tokens/s"),
    ("goodput", "goodput"),
)
_DRAINED = 32  # sequences of an engine that is to be drained
_OUTPUT_PRICE = 4.0  # of a token, in prompt tokens: usual price lists

console = make_console()


@dataclass(frozen=True)
class Place:
    """A trace on a fleet, and the share of its capacity at which it is looked at."""

    title: str
    pattern: str
    num_engines: int
    load: float
    kv_share: float = 1.0  # of the profile's KV cache: a larger model on the same card


PLACES = (
    Place("deepseek-r1, little KV", "*deepseek-r1*", 4, 0.75, 0.15),
    Place("azure-conv", "azure*conv*", 8, 0.85),
    Place("azure-conv, little KV", "azure*conv*", 8, 0.85, 0.08),
)


class Known:
    """What could be known of the lengths of one run's answers, [num_requests] each, tokens."""

    def __init__(self, workload: Workload, seed: int) -> None:
        rng = np.random.default_rng([seed, 21])
        self.truth = np.array([each.num_output_tokens for each in workload.arrivals])
        self.none = np.full(len(self.truth), round(PRIOR_TOKENS))
        self.learned = _learned(workload)
        log = np.log(self.truth)
        signal = log + _blur(log, rng) * rng.standard_normal(len(log))
        edges = np.quantile(signal, np.linspace(0, 1, _NUM_BINS + 1)[1:-1])
        self.bins = np.searchsorted(edges, signal)
        members = [self.truth[self.bins == number] for number in range(_NUM_BINS)]
        self.predicted = np.array([round(each.mean()) for each in members])[self.bins]
        self.high = np.array([round(np.quantile(each, 0.8)) for each in members])[self.bins]
        self._members = members

    def drawn(self, rng: np.random.Generator) -> np.ndarray:
        """Return lengths drawn from what the predictor says of each request."""
        found = np.empty(len(self.truth))
        for number, members in enumerate(self._members):
            here = self.bins == number
            found[here] = rng.choice(members, here.sum())
        return found


def _blur(log: np.ndarray, rng: np.random.Generator) -> float:
    """Return the deviation of the noise under which the ranking is right to `_TAU`."""
    chosen = rng.choice(len(log), min(3000, len(log)), replace=False)
    noise = rng.standard_normal(len(chosen))
    low, high = 0.0, 10.0
    for _ in range(12):
        middle = (low + high) / 2
        tau = kendalltau(log[chosen], log[chosen] + middle * noise).statistic
        low, high = (middle, high) if tau > _TAU else (low, middle)
    return low


def _learned(workload: Workload) -> np.ndarray:
    """Return what `OutputLengths` predicts if it learns of every answer at once."""
    lengths, found = OutputLengths(), []
    for number, each in enumerate(workload.arrivals):
        request = Request(
            id=str(number), model="m", num_prompt_tokens=each.num_prompt_tokens, tenant=each.tenant
        )
        found.append(lengths.predict(request))
        lengths.learn(request, each.num_output_tokens)
    return np.array(found)


Told = tuple[str, Callable[[Known], np.ndarray | None], Callable[[Known], np.ndarray | None]]
# What is expected (the congestion cost goes by it), and what KV room is kept for.
_LEARNED = "both: what a service learns, without text"
VARIANTS: tuple[Told, ...] = (
    ("today's mean for all", lambda _: None, lambda _: None),
    ("cost: nothing", lambda known: known.none, lambda _: None),
    ("cost: predictor", lambda known: known.predicted, lambda _: None),
    ("cost: truth", lambda known: known.truth, lambda _: None),
    ("KV: nothing", lambda _: None, lambda known: known.none),
    ("KV: max_tokens 4096", lambda _: None, lambda known: np.full(len(known.truth), _LIMIT)),
    ("KV: predictor's mean", lambda _: None, lambda known: known.predicted),
    ("KV: predictor's 80 %", lambda _: None, lambda known: known.high),
    ("KV: truth", lambda _: None, lambda known: known.truth),
    (_LEARNED, lambda _: None, lambda _: None),
    ("both: predictor", lambda known: known.predicted, lambda known: known.predicted),
    ("both: truth", lambda known: known.truth, lambda known: known.truth),
)


def main() -> int:
    options = _parse()
    names = {place.title: _shown_file(place, options) for place in PLACES}
    report = Report(
        "length-value",
        "simulated",
        options.seed,
        {
            "profile": options.profile,
            "requests": options.requests,
            "repeats": options.repeats,
            "tau": _TAU,
            "places": {place.title: f"{place} {names[place.title]}" for place in PLACES},
        },
    )
    for place in PLACES:
        profile = load_profile(options.profile)
        profile = profile.model_copy(
            update={"num_kv_tokens": int(profile.num_kv_tokens * place.kv_share)}
        )
        base = _read(place, options).fitted(min(profile.max_model_len, profile.num_kv_tokens // 4))
        found = _simulated(place, base, profile, options)
        for row in _rows(found):
            report.add_row(f"{place.title}: told of lengths (simulated)", **row)
        for row in _told_rows(base, options):
            report.add_row(f"{place.title}: median relative error of what people are told", **row)
    if options.dry:
        report.show(console)
    else:
        report.finish()
    return 0


def _learned_distribution() -> Lengths:
    return PredictedLengths(TextModel([], 0))


def _given(expected: list[int] | None, booked: list[int] | None) -> Lengths:
    return GivenLengths(OutputLengths(), expected, booked)


def _simulated(
    place: Place, base: Workload, profile: Profile, options: argparse.Namespace
) -> dict[str, list[Figures]]:
    fleet = Fleet(profile, place.num_engines)
    capacity = simulated_capacity(base.part(0, 4000), replace(fleet, num_engines=2), options.seed)
    rate = place.load * capacity * place.num_engines / 2
    console.print(f"{place.title}: {rate:.2f} requests/s (simulated)")
    found: dict[str, list[Figures]] = {name: [] for name, _, _ in VARIANTS}
    for repeat in range(options.repeats):
        seed = options.seed + 1 + repeat
        workload = base.drawn(rate, options.requests, seed)
        known = Known(workload, seed)
        unloaded: UnloadedTimes | None = None
        for name, expected, booked in VARIANTS:
            told = [
                None if each is None else each.tolist() for each in (expected(known), booked(known))
            ]
            make = _learned_distribution if name == _LEARNED else partial(_given, *told)
            run = simulate(
                workload,
                fleet,
                "headway",
                seed=seed,
                make_lengths=make,
            )
            if unloaded is None:
                unloaded = UnloadedTimes.of(run.num_prompt_tokens, run.num_output_tokens, profile)
            figures = figures_of(run, Promises(), unloaded=unloaded, window=STEADY)
            found[name].append(figures)
            shown = ", ".join(f"{title} {figures[key]:.4g}" for key, title in _SHOWN)
            console.print(f"{seed} {name}: {shown}, {figures['num_preemptions']:.0f} preempted")
    return found


def _rows(found: dict[str, list[Figures]]) -> list[dict[str, str]]:
    """Return the table's rows: today's figures, and others' over them, with bootstrap intervals."""
    base = found[VARIANTS[0][0]]
    rows = []
    for name, runs in found.items():
        row = {"told": name}
        for key, title in _SHOWN:
            if runs is base:
                row[title] = f"{np.mean([each[key] for each in runs]):.4g}"
                continue
            ratios = [each[key] / other[key] for each, other in zip(runs, base, strict=True)]
            low, high = interval(ratios)
            row[title] = f"×{np.mean(ratios):.3f} [{low:.3f}, {high:.3f}]"
        row["preemptions"] = f"{np.mean([each['num_preemptions'] for each in runs]):,.0f}"
        rows.append(row)
    return rows


def _told_rows(base: Workload, options: argparse.Namespace) -> list[dict[str, str]]:
    """Return how far off is what people are told, by what is known of lengths."""
    rng = np.random.default_rng([options.seed, 22])
    part = base.part(0, options.requests)
    known = Known(part, options.seed)
    prompts = np.array([each.num_prompt_tokens for each in part.arrivals])
    rows = []
    for name, said in (
        ("nothing", known.none),
        ("today's mean", known.learned),
        ("predictor", known.predicted),
        ("truth", known.truth),
    ):
        price = prompts + _OUTPUT_PRICE * known.truth
        errors = {
            "an answer's end": np.abs(said - known.truth) / known.truth,
            "price": np.abs(said - known.truth) * _OUTPUT_PRICE / price,
        }
        row = {"known": name} | {title: f"{np.median(each):.2f}" for title, each in errors.items()}
        drain = _drain_error(known, said, name == "predictor", rng)
        rows.append(row | {f"{_DRAINED} answers drained": f"{drain:.2f}"})
    return rows


def _drain_error(
    known: Known, said: np.ndarray, has_distribution: bool, rng: np.random.Generator
) -> float:
    """Return the median relative error of the steps until an engine has ended what it runs.

    With a distribution: the median of the longest of draws that are longer than what has come.
    """
    errors = []
    draws = [known.drawn(rng) for _ in range(40)] if has_distribution else [said]
    chances = known.truth / known.truth.sum()  # who runs is more likely to be long
    for _ in range(200):
        running = rng.choice(len(known.truth), _DRAINED, p=chances)
        come = rng.random(_DRAINED) * known.truth[running]
        left = (known.truth[running] - come).max()
        guesses = [np.maximum(each[running] - come, 0.0).max() for each in draws]
        errors.append(abs(float(np.median(guesses)) - left) / left)
    return float(np.median(errors))


def _read(place: Place, options: argparse.Namespace) -> Workload:
    file = _file(place, options)
    if file is None:
        return SYNTHETIC["poisson"](4 * options.requests, options.seed)
    return read_trace(file, options.seed)


def _file(place: Place, options: argparse.Namespace) -> Path | None:
    files = sorted(options.traces.iterdir()) if options.traces else []
    return next((each for each in files if fnmatch(each.name.lower(), place.pattern)), None)


def _shown_file(place: Place, options: argparse.Namespace) -> str:
    file = _file(place, options)
    return "synthetic: no trace" if file is None else file.name


def _parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="h100")
    environment = os.environ.get("HEADWAY_TRACES")
    default = Path(environment) if environment else None
    parser.add_argument("--traces", type=Path, metavar="DIR", default=default)
    parser.add_argument("--requests", type=int, default=6_000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="show the tables, write nothing")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
