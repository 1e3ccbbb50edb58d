"""How well did a run serve its requests, and how far can the figures be trusted?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from router import Outcome, RouterSettings
from router.simulation.engine.unloaded import UnloadedTimes
from router.simulation.journal import Run

# The first tenth of a run fills empty engines and is left out.
WARM = (0.1, 1.0)
# In its last tenth, the last that a run completes are those that took longest, and no more come.
STEADY = (0.1, 0.9)
_PERCENTS = (50, 90, 99)
# Fewer requests of a tenant say nothing about fairness.
_MIN_TENANT_REQUESTS = 20
_NUM_RESAMPLES = 1000

Figures = dict[str, float]


@dataclass(frozen=True)
class Slo:
    """A first token in time, and then a steady flow: both, or the reply does not count.

    Goodput as in DistServe (Zhong et al., OSDI 2024).
    """

    ttft_s: float | None = None  # unset: the router's own target, by the size of the prompt
    tpot_s: float = 0.05  # 20 tokens/s, about four times as fast as people read

    def __reduce__(self) -> tuple[type["Slo"], tuple[float | None, float]]:
        return Slo, (self.ttft_s, self.tpot_s)  # as `Workload` does

    def ttft_target_s(self, num_prompt_tokens: Any) -> Any:
        """Return the latest time to first token that meets it, seconds, by the prompt's size.

        By sizes, an array, too.
        """
        if self.ttft_s is not None:
            return self.ttft_s
        defaults = RouterSettings()
        return defaults.ttft_target_base_s + defaults.ttft_target_s_per_token * num_prompt_tokens

    def met(self, run: Run) -> np.ndarray:
        """Return which requests met both, [num_requests]; none that failed."""
        first = run.ttft_s <= self.ttft_target_s(run.num_prompt_tokens)  # false for nan
        flow = (run.tpot_s <= self.tpot_s) | (run.num_output_tokens < 2)
        met: np.ndarray = run.completed & first & flow
        return met

    def __str__(self) -> str:
        ttft = "the router's target" if self.ttft_s is None else f"{self.ttft_s:g} s"
        return f"TTFT within {ttft}, TPOT within {self.tpot_s:g} s"


@dataclass(frozen=True)
class Promises:
    """A first token, and a time per token, within so many times those of an idle engine.

    So that each request is promised what its size allows, and a promise that all or none keep is
    told from one that sets policies apart.
    """

    ttft_factor: float = 5.0
    tpot_factor: float = 3.0

    def __reduce__(self) -> tuple[type["Promises"], tuple[float, float]]:
        return Promises, (self.ttft_factor, self.tpot_factor)  # as `Workload` does

    def kept(self, run: Run, unloaded: UnloadedTimes) -> np.ndarray:
        """Return which requests kept both, [num_requests]; none that failed."""
        first = run.ttft_s <= self.ttft_factor * unloaded.first_s  # false for nan
        flow = (run.tpot_s <= self.tpot_factor * unloaded.each_s) | (run.num_output_tokens < 2)
        return run.completed & first & flow

    def __str__(self) -> str:
        return (
            f"TTFT within {self.ttft_factor:g} times, TPOT within {self.tpot_factor:g} times that "
            "of an idle engine"
        )


def size_classes(run: Run) -> dict[str, np.ndarray]:
    """Return which requests are of each class, [num_requests] each.

    `short` is the lower half of the prompts by size, `long` the upper tenth, `all` everything;
    and each priority class where there are several.
    """
    half, tenth = np.percentile(run.num_prompt_tokens, (50, 90))
    classes = {
        "all": np.ones(len(run), dtype=bool),
        "short": run.num_prompt_tokens <= half,
        "long": run.num_prompt_tokens > tenth,
    }
    names = np.unique(run.priority_class)
    if len(names) > 1:
        classes |= {str(name): run.priority_class == name for name in names}
    return classes


def figures_of(
    run: Run,
    slo: Slo | Promises,
    *,
    unloaded: UnloadedTimes | None = None,
    window: tuple[float, float] = WARM,
) -> Figures:
    """Return all figures by name: `ttft_p99_s` of all requests, `short_ttft_p99_s` of a class.

    Seconds, shares 0–1 and counts; `nan` where there is nothing to count. Of the requests that came
    within `window`, shares of all. With `unloaded` also `slowdown_p99`: the time to the last
    token over that of an idle engine. Promises need it.
    """
    first, last = (int(share * len(run)) for share in window)
    steady = np.zeros(len(run), dtype=bool)
    steady[first:last] = True
    if isinstance(slo, Promises):
        assert unloaded is not None
        met = slo.kept(run, unloaded)
    else:
        met = slo.met(run)
    slowdown = run.e2e_s / unloaded.whole_s if unloaded is not None else None
    classes = size_classes(run)
    shed = run.has(Outcome.REJECTED) | run.has(Outcome.EXPIRED)
    found: Figures = {}
    for name, members in classes.items():
        prefix = "" if name == "all" else f"{name}_"
        chosen = members & steady
        for figure, values in (
            ("ttft", run.ttft_s),
            ("tpot", run.tpot_s),
            ("e2e", run.e2e_s),
            ("hold", run.hold_s),
        ):
            for percent in _PERCENTS:
                found[f"{prefix}{figure}_p{percent}_s"] = percentile(values[chosen], percent)
            found[f"{prefix}{figure}_mean_s"] = _mean(values[chosen])
        if slowdown is not None:
            for percent in _PERCENTS:
                found[f"{prefix}slowdown_p{percent}"] = percentile(slowdown[chosen], percent)
        found[f"{prefix}goodput"] = _mean(met[chosen])
        found[f"{prefix}num_preemptions"] = float(run.num_preemptions_each[members].sum())
        found[f"{prefix}num_shed"] = float((shed & members).sum())
        found[f"{prefix}refused"] = _mean(shed[chosen])
        found[f"{prefix}prefix_hit_tokens"] = float(run.num_cached_tokens[chosen].sum())
        num_prompt_tokens = run.num_prompt_tokens[chosen & run.completed].sum()
        found[f"{prefix}prefix_hit_share"] = _ratio(
            found[f"{prefix}prefix_hit_tokens"], num_prompt_tokens
        )
    gaps = run.gaps_within(window)
    for percent in (50, 99):
        found[f"itl_p{percent}_s"] = weighted_percentile(
            run.gaps_s[gaps], run.gap_counts[gaps], percent
        )
    start_s, end_s = run.arrival_s[steady][0], run.arrival_s[steady][-1]
    counted = run.completed & (run.end_s >= start_s) & (run.end_s <= end_s)
    found["output_tokens_per_s"] = _ratio(run.num_output_tokens[counted].sum(), end_s - start_s)
    found["fairness"] = jain(_shares_met(run, met & steady, steady, classes))
    found["completed"] = float(run.completed.mean())
    found["num_failed"] = float(run.has(Outcome.FAILED).sum())
    found["num_preemptions"] = float(run.num_preemptions)
    return found


def percentile(values: np.ndarray, percent: float) -> float:
    """Return the percentile of the values that are not `nan` (nearest rank); `nan` if none."""
    known = values[~np.isnan(values)]
    if not len(known):
        return float("nan")
    return float(np.percentile(known, percent, method="inverted_cdf"))


def weighted_percentile(values: np.ndarray, counts: np.ndarray, percent: float) -> float:
    """Return the percentile of values that each count several times; `nan` if there are none.

    `values` and `counts`: [num_values].
    """
    if not len(values):
        return float("nan")
    order = np.argsort(values)
    cumulated = np.cumsum(counts[order])
    rank = np.searchsorted(cumulated, cumulated[-1] * percent / 100.0)
    return float(values[order][rank])


def jain(shares: Sequence[float]) -> float:
    """Return Jain's index of fairness: 1 for equal shares, 1/n where one has everything.

    Jain, Chiu and Hawe (1984). `nan` where all shares are 0.
    """
    values = np.array(shares)
    squares = len(values) * (values**2).sum()
    return float(values.sum() ** 2 / squares) if squares else float("nan")


def interval(
    values: Sequence[float],
    seed: int = 0,
    statistic: Callable[..., np.ndarray] = np.mean,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Return a bootstrap interval of a statistic over repeats (percentiles; Efron 1979).

    With only a handful of repeats it shows the spread and no more.
    """
    rng = np.random.default_rng(seed)
    known = np.array([value for value in values if not np.isnan(value)])
    if not len(known):
        return float("nan"), float("nan")
    drawn = statistic(rng.choice(known, (_NUM_RESAMPLES, len(known))), axis=1)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(drawn, (tail, 1.0 - tail))
    return float(low), float(high)


def knee(loads: Sequence[float], ttft_p99_s: Sequence[float]) -> float | None:
    """Return the load above which waits grow steeply; `None` where they do not.

    It is the last load at which the p99 of TTFT is at most twice that of the lowest load.
    """
    if len(loads) < 2 or ttft_p99_s[-1] <= 2.0 * ttft_p99_s[0]:
        return None
    pairs = zip(loads, ttft_p99_s, strict=True)
    return max(load for load, p99_s in pairs if p99_s <= 2.0 * ttft_p99_s[0])


def brief(value: float) -> str:
    """Return the number with about three significant digits."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _shares_met(
    run: Run, met: np.ndarray, steady: np.ndarray, classes: Mapping[str, np.ndarray]
) -> list[float]:
    """Return the share of each tenant's requests that met the SLO.

    Of each class, if the workload does not tell tenants apart.
    """
    tenants, numbers = np.unique(run.tenant, return_inverse=True)
    counts = np.bincount(numbers[steady], minlength=len(tenants))
    seen = counts >= _MIN_TENANT_REQUESTS
    if seen.sum() > 1:
        return list(np.bincount(numbers[met], minlength=len(tenants))[seen] / counts[seen])
    return [_mean(met[members & steady]) for name, members in classes.items() if name != "all"]


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)] if values.dtype.kind == "f" else values
    return float(known.mean()) if len(known) else float("nan")


def _ratio(one: float, other: float) -> float:
    return float(one / other) if other else float("nan")
