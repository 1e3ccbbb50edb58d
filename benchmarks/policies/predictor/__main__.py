"""How well are the lengths of answers predicted? `make eval-predictor`.

    python -m benchmarks.policies.predictor --traces DIR [--dry]

On prompts that nothing was learned from: folds of the instruction set; then each of its sources,
and conversations, by what the others teach, at first and after 500 answers of their own. Without
the data a made-up set shows that it runs, and nothing else.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from scipy.stats import kendalltau

from benchmarks.policies.predictor.baselines import BASELINES
from benchmarks.policies.predictor.sources import (
    CONVERSATIONS,
    INSTRUCTIONS,
    Example,
    logs,
    made_up,
    read_examples,
)
from benchmarks.policies.predictor.train import parse_traces
from benchmarks.policies.predictor.training import train
from benchmarks.report.console import make_console
from benchmarks.report.report import Report
from router.estimators.lengths.distribution import LEVELS
from router.estimators.lengths.forecast import Forecast
from router.estimators.lengths.predicted import PredictedLengths
from router.estimators.lengths.text_model import TextModel
from serving.gateway.intake.length.cues import FIRST_WORD
from serving.gateway.intake.length.wording import instruction_features

NUM_ONLINE = 500
_ROLLING = 100
_COLD = (0, 25, 50, 100, 200, 500, 1000)
# Of `LEVELS`, what bounds the intervals.
_INTERVALS = {"50 %": (2, 4), "80 %": (1, 5), "95 %": (0, 6)}
_MIDDLE = LEVELS.index(0.5)

console = make_console()


def main() -> int:
    options = parse_traces(__doc__ or "", ("seed", 0), ("folds", 5))
    known: list[Example] = []
    conversations: list[Example] = []
    if options.traces is not None:
        known = read_examples(options.traces, INSTRUCTIONS)
        conversations = read_examples(options.traces, CONVERSATIONS, "sharegpt")
    is_made_up = not known
    if is_made_up:
        console.print(
            "No traces (docs/predictor.md): a made-up set, which says nothing of real ones."
        )
        known = made_up(500, options.seed)
    config = {"folds": options.folds, "examples": len(known), "online": NUM_ONLINE}
    report = Report("predictor", "measured", options.seed, config)
    if is_made_up:
        report.add_note("Of a made-up set: it shows that this runs, and nothing else.")
    _held_out(report, known, options.folds, options.seed)
    _other_sources(report, known, conversations, options.seed)
    _timed(report, known)
    report.add_note(
        "No several answers per prompt are in the data: the ceiling by sampling noise is not known."
    )
    report.add_note("max_tokens as a baseline: no prompt of these sets has any.")
    if options.dry or is_made_up:
        report.show(console)
    else:
        report.finish()
    return 0


def _held_out(report: Report, known: list[Example], num_folds: int, seed: int) -> None:
    """Judge on folds: each by what the others teach, at first and learning as it goes."""
    order = np.random.default_rng(seed).permutation(len(known))
    figures: dict[str, list[dict[str, float]]] = defaultdict(list)
    for fold in np.array_split(order, num_folds):
        held = set(fold.tolist())
        asked = [known[number] for number in fold]
        taught = [known[number] for number in order if number not in held]
        for name, learn in BASELINES.items():
            figures[name].append(_of_points(learn(taught)(asked), asked))
        weights, prior = train(taught)
        trained = _lengths(weights, prior)
        figures["ours, as trained"].append(
            _of_forecasts([trained.forecast(each.request()) for each in asked], asked)
        )
        figures["ours, learning"].append(
            _of_forecasts(_learning(_lengths(weights, prior), asked), asked)
        )
    for name, found in figures.items():
        row = {key: float(np.mean([each[key] for each in found])) for key in found[0]}
        report.add_row("held-out prompts of the same sources", predictor=name, **_shown(row))
    tau = float(np.mean([each["tau"] for each in figures["ours, as trained"]]))
    report.add_target("tau, held-out prompts", tau, ">= 0.55")


def _other_sources(
    report: Report, known: list[Example], conversations: list[Example], seed: int
) -> None:
    """Judge on each source by what the others teach, and while it learns there."""
    by_source: dict[str, list[Example]] = defaultdict(list)
    for each in known:
        by_source[each.source].append(each)
    for source, asked in [*by_source.items(), ("sharegpt", conversations)]:
        taught = [each for each in known if each.source != source]
        if not asked or not taught:
            continue
        weights, prior = train(taught)
        order = np.random.default_rng(seed).permutation(len(asked))
        asked = [asked[number] for number in order]
        trained = _lengths(weights, prior)
        cold = _of_forecasts([trained.forecast(each.request()) for each in asked], asked)
        forecasts = _learning(_lengths(weights, prior), asked, NUM_ONLINE)
        rest = slice(min(NUM_ONLINE, len(asked) // 2), None)
        warm = _of_forecasts(forecasts[rest], asked[rest])
        inside = _inside(_learning(_lengths(weights, prior), asked), asked, "80 %")
        rolling = [
            float(np.mean(inside[start : start + _ROLLING]))
            for start in range(0, max(1, len(inside) - _ROLLING + 1), _ROLLING // 2)
        ]
        report.add_row(
            "another source, which was not trained on",
            source=source,
            examples=len(asked),
            **{
                "tau, not adapted": round(cold["tau"], 3),
                f"tau after {rest.start}": round(warm["tau"], 3),
                "80 % interval, all": round(float(np.mean(inside)), 3),
                f"its lowest of {_ROLLING}": round(min(rolling), 2),
                f"its highest of {_ROLLING}": round(max(rolling), 2),
            },
        )
        report.add_target(f"tau, {source}, not adapted", cold["tau"], ">= 0.30")
        report.add_target(f"tau, {source}, after {rest.start}", warm["tau"], ">= 0.40")
        report.add_target(f"80 % interval, {source}, low", float(np.mean(inside)), ">= 0.75")
        report.add_target(f"80 % interval, {source}, high", float(np.mean(inside)), "<= 0.85")
        _cold_to_warm(report, source, weights, prior, asked)


def _cold_to_warm(
    report: Report, source: str, weights: np.ndarray, prior: float, asked: Sequence[Example]
) -> None:
    """Judge on the last third after so many of the first ones were learned from."""
    rest = asked[-len(asked) // 3 :]
    row: dict[str, float] = {}
    for number in _COLD:
        if number > len(asked) - len(rest):
            break
        lengths = _lengths(weights, prior)
        for each in asked[:number]:
            lengths.learn(each.request(), each.num_output_tokens)
        row[str(number)] = _of_forecasts([lengths.forecast(each.request()) for each in rest], rest)[
            "tau"
        ]
    shown = {key: round(value, 3) for key, value in row.items()}
    report.add_row("from cold to warm: tau by answers learned from", source=source, **shown)


def _timed(report: Report, known: list[Example]) -> None:
    """Add what it costs, CPU microseconds, the median over prompts."""
    weights, prior = train(known[:200])
    lengths = _lengths(weights, prior)
    spent: dict[str, list[float]] = {"features": [], "forecast": [], "learning": []}
    for each in known[:1000]:
        began_ns = time.process_time_ns()
        instruction_features(each.prompt)
        spent["features"].append(time.process_time_ns() - began_ns)
        request = each.request()
        began_ns = time.process_time_ns()
        lengths.forecast(request)
        spent["forecast"].append(time.process_time_ns() - began_ns)
        began_ns = time.process_time_ns()
        lengths.learn(request, each.num_output_tokens)
        spent["learning"].append(time.process_time_ns() - began_ns)
    medians = {name: float(np.median(values)) / 1000 for name, values in spent.items()}
    report.add_row("CPU, µs, median", **{key: round(value, 1) for key, value in medians.items()})
    whole = medians["features"] + medians["forecast"]
    report.add_target("features and forecast, CPU µs", whole, "<= 100")


def _lengths(weights: np.ndarray, prior: float) -> PredictedLengths:
    return PredictedLengths(TextModel(weights.tolist(), FIRST_WORD), prior)


def _learning(
    lengths: PredictedLengths, asked: Sequence[Example], num_learned: int = sys.maxsize
) -> list[Forecast]:
    """Return what is said of each before its answer is learned from; of the first ones alone."""
    found = []
    for number, each in enumerate(asked):
        request = each.request(number)
        found.append(lengths.forecast(request))
        if number < num_learned:
            lengths.learn(request, each.num_output_tokens)
    return found


def _of_points(predicted: np.ndarray, asked: Sequence[Example]) -> dict[str, float]:
    """Return how good log(tokens) are; nan for what only a distribution has."""
    actual = logs(list(asked))
    return {
        "tau": _tau(predicted, actual),
        "MAE, log tokens": float(np.abs(predicted - actual).mean()),
        "pinball": float("nan"),
        **dict.fromkeys(_INTERVALS, float("nan")),
    }


def _of_forecasts(forecasts: Sequence[Forecast], asked: Sequence[Example]) -> dict[str, float]:
    """Return how good distributions are; the pinball loss is of log(tokens), over `LEVELS`."""
    actual = logs(list(asked))
    quantiles = np.log([each.quantiles for each in forecasts])
    above = actual[:, None] - quantiles
    levels = np.array(LEVELS)
    expected = np.array([each.num_expected_tokens for each in forecasts])
    return {
        "tau": _tau(expected, actual),
        "MAE, log tokens": float(np.abs(above[:, _MIDDLE]).mean()),
        "pinball": float(np.maximum(levels * above, (levels - 1.0) * above).mean()),
        **{name: float(np.mean(_inside(forecasts, asked, name))) for name in _INTERVALS},
    }


def _inside(forecasts: Sequence[Forecast], asked: Sequence[Example], name: str) -> list[bool]:
    """Return which answers are within an interval of theirs."""
    low, high = _INTERVALS[name]
    return [
        said.quantiles[low] <= each.num_output_tokens <= said.quantiles[high]
        for said, each in zip(forecasts, asked, strict=True)
    ]


def _tau(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Return Kendall's tau-b; 0 where all is predicted alike."""
    tau = float(kendalltau(predicted, actual).statistic)
    return 0.0 if np.isnan(tau) else tau


def _shown(row: dict[str, float]) -> dict[str, float | str]:
    return {key: "" if np.isnan(value) else round(value, 3) for key, value in row.items()}


if __name__ == "__main__":
    raise SystemExit(main())
