"""What a provider is worth in a spike: `python -m benchmarks.policies.spillover`.

The deployed router over simulated engines and a simulated provider, in virtual
time: never spill; spill where a bounded queue is full, which is where a server
without predictions answers 429; spill by the predicted wait. Goodput against cost:
by the predicted wait also for less money than each bound spent (`max_cost_per_hour`).
"""

import argparse
import os
import random
import sys
from collections.abc import Sequence
from multiprocessing import get_context
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks.report.report import Report, Spread
from router import RouterSettings
from router.providers.provider import ProviderSettings
from router.providers.spillover import FallbackSettings
from router.simulation.engine.model import EngineModel
from router.simulation.engine.profile import Profile
from router.simulation.figures import Slo, figures_of, interval
from router.simulation.provider import ProviderModel
from router.simulation.simulator import Simulation
from router.simulation.workload.lengths import LogNormal, TokenCounts
from router.simulation.workload.synthetic import PROMPTS, REPLIES, SYNTHETIC, of
from router.simulation.workload.workload import Workload
from serving.capacity.profiles import ProfileError, load_profile
from serving.capacity.sweep import Fleet, capacity

# A small hosted model's list prices (GPT-4o mini, 2024), and its usual speed from afar.
_PRICE_PROMPT, _PRICE_OUTPUT = 0.15, 0.60
_TTFT_S, _TTFT_SIGMA, _TPOT_S = 0.4, 0.3, 0.012
# By requests held per engine: from a queue that hardly delays to one that hides a spike.
# Which of them suits a load shows in hindsight only. By default neither vLLM's queue nor those of
# other routers have a bound that a spike would reach: they never answer 429.
_BOUNDS = (2, 4, 8, 12, 16, 32, 64)
_FACTORS = (0.9, 1.0, 1.1)
_NEVER, _AT_429 = "never", "at 429"
_LESS_MONEY = "by predicted wait, for less money than "
# Of the money. What is under way may end dearer than was expected and reserved, by up to 4 % here.
_LESS = 0.95
_DEFAULT = f"by predicted wait, late after {FallbackSettings().late_factor:g} promises"

# What engines run short of: prefill, by the medians of Azure's code trace (2023), and
# decode, where every request gets in at once and all of them get slower.
_SIZES: dict[str, tuple[TokenCounts, TokenCounts]] = {
    "code": (LogNormal(1500.0, 0.9, high=8_000), LogNormal(25.0, 0.8, high=500)),
    "chat": (PROMPTS, REPLIES),
}

# What users of H100s are promised here; the router's own default is for any hardware. How
# steadily tokens follow is not part of it: the router does not predict that yet.
_PROMISE_S = 1.0
_PROMISE = {"ttft_target_base_s": _PROMISE_S, "ttft_target_s_per_token": 0.0}
_SLO = Slo(ttft_s=_PROMISE_S, tpot_s=1.0)

console = Console(highlight=False)


def spike(sizes: str, num_requests: int, seed: int, profile: Profile) -> Workload:
    """Return requests of these sizes, a tenth of the time at four times the rate."""
    times_s = [arrival.offset_s for arrival in SYNTHETIC["spike"](num_requests, seed).arrivals]
    prompts, replies = _SIZES[sizes]
    return of(sizes, np.array(times_s), seed, prompts, replies).fitted(profile.max_model_len)


def variants(num_engines: int) -> dict[str, tuple[dict[str, Any], FallbackSettings | None]]:
    """Return what is compared, by name: settings of the router, and when it spills."""
    found: dict[str, tuple[dict[str, Any], FallbackSettings | None]] = {_NEVER: ({}, None)}
    for bound in _BOUNDS:
        found[f"{_AT_429}, {bound} held per engine"] = (
            {"max_held_requests": bound * num_engines},
            FallbackSettings(spill="full"),
        )
    for factor in _FACTORS:
        found[f"by predicted wait, late after {factor:g} promises"] = (
            {},
            FallbackSettings(spill="late", late_factor=factor),
        )
    return found


def measure(
    workload: Workload,
    profile: Profile,
    num_engines: int,
    settings: dict[str, Any],
    fallback: FallbackSettings | None,
    options: argparse.Namespace,
    seed: int,
    most_cost: float | None = None,
) -> dict[str, float]:
    """Return the figures of one run, in which no more than `most_cost` is spent."""
    limits = {"rpm": options.rpm, "tpm": options.tpm, "max_cost_per_hour": most_cost}
    terms = ProviderSettings.model_validate(
        {
            "name": "far",
            "models": {profile.model: profile.model},
            "price_prompt": _PRICE_PROMPT,
            "price_output": _PRICE_OUTPUT,
            "keys": [limits],
        }
    )
    provider = ProviderModel(
        terms,
        random.Random(f"provider {seed}"),
        ttft_s=_TTFT_S,
        ttft_sigma=_TTFT_SIGMA,
        tpot_s=_TPOT_S,
        rpm=options.rpm,
        tpm=options.tpm,
    )
    simulation = Simulation(
        workload,
        RouterSettings(**_PROMISE, **settings, seed=seed),
        lambda rng: EngineModel(profile, rng),
        num_engines,
        providers=() if fallback is None else (provider,),
        fallback=fallback,
        seed=seed,
    )
    run = simulation.run()
    figures = figures_of(run, _SLO)
    return {
        "goodput": float(_SLO.met(run).mean()),
        "cost": provider.cost,
        "spilled": provider.num_answered / len(run),
        "refused": float(provider.num_refused),
        "shed": figures["num_shed"],
        "ttft_p50_s": figures["ttft_p50_s"],
        "ttft_p99_s": figures["ttft_p99_s"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        profile = load_profile(options.profile)
    except ProfileError as error:
        console.print(str(error), markup=False)
        return 1
    fleet = Fleet(profile, options.engines)
    most = {
        sizes: capacity(spike(sizes, options.requests, options.seed, profile), fleet, options.seed)
        for sizes in options.sizes
    }
    config = {
        "profile": profile.model_dump(),
        "num_engines": options.engines,
        "workloads": "spikes: a tenth of the time at four times the rate",
        "num_requests": options.requests,
        "num_repeats": options.repeats,
        "loads": options.loads,
        "capacity_requests_per_s": most,
        "prices_per_million": [_PRICE_PROMPT, _PRICE_OUTPUT],
        "provider": {"ttft_s": _TTFT_S, "ttft_sigma": _TTFT_SIGMA, "tpot_s": _TPOT_S}
        | {"rpm": options.rpm, "tpm": options.tpm},
        "slo": str(_SLO),
    }
    report = Report(options.name, "simulated", options.seed, config)
    cases = [
        (sizes, load, name)
        for sizes in options.sizes
        for load in options.loads
        for name in variants(options.engines)
    ]
    context = get_context("forkserver")
    with context.Pool(len(os.sched_getaffinity(0))) as pool:
        jobs = [
            (sizes, load * most[sizes], name, options, seed)
            for sizes, load, name in cases
            for seed in range(options.seed, options.seed + options.repeats)
        ]
        results = pool.imap(_measure, jobs)
        for sizes, load, _ in track(cases, "simulated runs", console=console):
            repeats = [next(results) for _ in range(options.repeats)]
            for name in repeats[0]:
                runs = [each[name] for each in repeats]
                report.row(
                    f"{sizes}, mean load {load:.0%}, {options.engines} engines, simulated",
                    spill=name,
                    **{figure: Spread.of([run[figure] for run in runs]) for figure in runs[0]},
                )
    _judge(report)
    if options.dry:
        report.show(console)
    else:
        report.finish()
    return 0


def _measure(job: tuple[str, float, str, argparse.Namespace, int]) -> dict[str, dict[str, float]]:
    """Return the figures by name: of the variant, and of ours with less money than it spent."""
    sizes, rate, name, options, seed = job
    profile = load_profile(options.profile)
    workload = spike(sizes, options.requests, seed, profile).at_rate(rate)

    def run(name: str, most_cost: float | None = None) -> dict[str, float]:
        settings, fallback = variants(options.engines)[name]
        return measure(
            workload, profile, options.engines, settings, fallback, options, seed, most_cost
        )

    found = {name: run(name)}
    if name.startswith(_AT_429):
        cost = found[name]["cost"]
        found[_LESS_MONEY + name] = run(_DEFAULT, _LESS * cost) if cost else run(_NEVER)
    return found


def _judge(report: Report) -> None:
    """Compare with every bound of the queue, seed by seed, and all loads together."""
    pooled: dict[str, list[tuple[float, float]]] = {}
    for title, rows in report.tables.items():
        places = {str(row["spill"]): _places(row) for row in rows}
        for name, place in places.items():
            pooled.setdefault(name, []).extend(place)
        _compare(report, title, places)
    _compare(report, "all together", pooled)


def _compare(report: Report, title: str, places: dict[str, list[tuple[float, float]]]) -> None:
    for name, theirs in places.items():
        if not name.startswith(_AT_429):
            continue
        for ours in (_DEFAULT, _LESS_MONEY + name):
            pairs = list(zip(places[ours], theirs, strict=True))
            gains = [mine[0] - its[0] for mine, its in pairs]
            costs = [mine[1] - its[1] for mine, its in pairs]
            report.note(
                f"{title}: {ours} beside {name}: goodput {_difference(gains)}, cost "
                f"{_difference(costs)} of {np.mean([its[1] for its in theirs]):.4f}: "
                f"{_verdict(interval(gains), interval(costs))}"
            )


def _verdict(gain: tuple[float, float], cost: tuple[float, float]) -> str:
    """Of 95% intervals of what is gained, and what it costs more."""
    if (gain[0] > 0.0 and cost[0] <= 0.0) or (cost[1] < 0.0 and gain[1] >= 0.0):
        return "dominated: surely better in one and not surely worse in the other"
    if gain[0] > 0.0:
        return "not dominated: it keeps surely less, for surely less"
    if cost[1] < 0.0:
        return "NOT dominated: it keeps surely more, for surely more"
    return "not surely better or worse"


def _places(row: dict[str, Any]) -> list[tuple[float, float]]:
    goodput, cost = row["goodput"], row["cost"]
    assert isinstance(goodput, Spread)
    assert isinstance(cost, Spread)
    return list(zip(goodput.values, cost.values, strict=True))


def _difference(values: list[float]) -> str:
    low, high = interval(values)
    return f"{np.mean(values):+.4f} ({low:+.4f} to {high:+.4f})"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="h100-llama8b", help="a profile's name or file")
    parser.add_argument("--sizes", nargs="+", choices=list(_SIZES), default=list(_SIZES))
    parser.add_argument("--engines", type=int, default=8)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.7, 0.9])
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--rpm", type=int, default=3000, help="the provider's limit")
    parser.add_argument("--tpm", type=int, default=5_000_000, help="the provider's limit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="spill", help="of the file in benchmarks/results")
    parser.add_argument("--dry", action="store_true", help="show the tables, write nothing")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
