"""What is a provider worth in a spike? Simulated.

    python -m benchmarks.policies.spillover

The deployed router over simulated engines and a simulated provider, in virtual time. Three rules
are compared by goodput and cost: never spill; spill when a bounded queue is full, where a server
without predictions answers 429; spill by the predicted wait. The last also runs with less money
than each bound spent (`max_cost_per_hour`).
"""

import argparse
import os
import random
import sys
from multiprocessing import get_context
from typing import Any

import numpy as np
from rich.progress import track

from benchmarks.report.console import make_console
from benchmarks.report.report import Report, Spread
from router import RouterSettings
from router.providers.settings import FallbackSettings, ProviderSettings
from router.simulation.engine.model import EngineModel
from router.simulation.engine.profile import Profile
from router.simulation.figures import Slo, figures_of, interval
from router.simulation.provider import ProviderModel
from router.simulation.simulator import Simulation
from router.simulation.workload.lengths import LogNormal, TokenCounts
from router.simulation.workload.synthetic import PROMPTS, REPLIES, SYNTHETIC, of
from router.simulation.workload.workload import Workload
from serving.capacity.profiles import ProfileError, load_profile
from serving.capacity.sweep import Fleet, simulated_capacity

# The list prices of a small hosted model (GPT-4o mini, 2024), and its usual speed.
_PRICE_PROMPT, _PRICE_OUTPUT = 0.15, 0.60
_TTFT_S, _TTFT_SIGMA, _TPOT_S = 0.4, 0.3, 0.012
# Requests held per engine: from a queue that hardly delays to one that hides a spike. Which bound
# suits a load is known only afterwards. By default neither vLLM's queue nor those of other routers
# have a bound that a spike would reach: they never answer 429.
_BOUNDS = (2, 4, 8, 12, 16, 32, 64)
_FACTORS = (0.9, 1.0, 1.1)  # of the TTFT target, after which a request is late
_NEVER, _AT_429 = "never", "at 429"
_LESS_MONEY = "by predicted wait, for less money than "
# Share of the money. Requests that are under way may cost more than was reserved, up to 4 % here.
_LESS = 0.95
# Names in results: a "promise" is the TTFT target.
_LATE = "by predicted wait, late after {:g} promises"
_DEFAULT = _LATE.format(FallbackSettings().late_factor)

# What engines run short of. Code: prefill, by the medians of Azure's trace (2023). Chat: decode,
# where every request starts at once and all become slower.
_SIZES: dict[str, tuple[TokenCounts, TokenCounts]] = {
    "code": (LogNormal(1500.0, 0.9, high=8_000), LogNormal(25.0, 0.8, high=500)),
    "chat": (PROMPTS, REPLIES),
}

# The TTFT target of H100s here; the router's default is for any hardware. The time per token hardly
# counts: the router does not predict it yet.
_TTFT_TARGET_S = 1.0
_TTFT_TARGET = {"ttft_target_base_s": _TTFT_TARGET_S, "ttft_target_s_per_token": 0.0}
_SLO = Slo(ttft_s=_TTFT_TARGET_S, tpot_s=1.0)

console = make_console()


def spike_workload(sizes: str, num_requests: int, seed: int, profile: Profile) -> Workload:
    """Return requests of these sizes; for a tenth of the time they come at four times the rate."""
    times_s = [arrival.offset_s for arrival in SYNTHETIC["spike"](num_requests, seed).arrivals]
    prompts, replies = _SIZES[sizes]
    return of(sizes, np.array(times_s), seed, prompts, replies).fitted(profile.max_model_len)


def spill_rules(num_engines: int) -> dict[str, tuple[dict[str, Any], FallbackSettings | None]]:
    """Return the rules to compare, by name: settings of the router, and when it spills."""
    found: dict[str, tuple[dict[str, Any], FallbackSettings | None]] = {_NEVER: ({}, None)}
    for bound in _BOUNDS:
        found[f"{_AT_429}, {bound} held per engine"] = (
            {"max_held_requests": bound * num_engines},
            FallbackSettings(spill="full"),
        )
    for factor in _FACTORS:
        found[_LATE.format(factor)] = (
            {},
            FallbackSettings(spill="late", late_factor=factor),
        )
    return found


def simulate_spilling(
    workload: Workload,
    profile: Profile,
    num_engines: int,
    settings: dict[str, Any],
    fallback: FallbackSettings | None,
    options: argparse.Namespace,
    seed: int,
    most_cost: float | None = None,
) -> dict[str, float]:
    """Return the figures of one run that spends at most `most_cost`."""
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
        RouterSettings(**_TTFT_TARGET, **settings, seed=seed),
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


def main() -> int:
    options = _parse()
    try:
        profile = load_profile(options.profile)
    except ProfileError as error:
        console.print(str(error), markup=False)
        return 1
    fleet = Fleet(profile, options.engines)
    capacities = {
        sizes: simulated_capacity(
            spike_workload(sizes, options.requests, options.seed, profile), fleet, options.seed
        )
        for sizes in options.sizes
    }
    config = {
        "profile": profile.model_dump(),
        "num_engines": options.engines,
        "workloads": "spikes: a tenth of the time at four times the rate",
        "num_requests": options.requests,
        "num_repeats": options.repeats,
        "loads": options.loads,
        "capacity_requests_per_s": capacities,
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
        for name in spill_rules(options.engines)
    ]
    context = get_context("forkserver")
    with context.Pool(len(os.sched_getaffinity(0))) as pool:
        jobs = [
            (sizes, load * capacities[sizes], name, options, seed)
            for sizes, load, name in cases
            for seed in range(options.seed, options.seed + options.repeats)
        ]
        results = pool.imap(_measure, jobs)
        for sizes, load, _ in track(cases, "simulated runs", console=console):
            repeats = [next(results) for _ in range(options.repeats)]
            for name in repeats[0]:
                runs = [each[name] for each in repeats]
                report.add_row(
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
    """Return the figures by name: of the rule, and of ours with less money than it spent."""
    sizes, rate, name, options, seed = job
    profile = load_profile(options.profile)
    workload = spike_workload(sizes, options.requests, seed, profile).at_rate(rate)

    def run(name: str, most_cost: float | None = None) -> dict[str, float]:
        settings, fallback = spill_rules(options.engines)[name]
        return simulate_spilling(
            workload, profile, options.engines, settings, fallback, options, seed, most_cost
        )

    found = {name: run(name)}
    if name.startswith(_AT_429):
        cost = found[name]["cost"]
        found[_LESS_MONEY + name] = run(_DEFAULT, _LESS * cost) if cost else run(_NEVER)
    return found


def _judge(report: Report) -> None:
    """Compare our rule with every bound of the queue, for each load and for all together."""
    pooled: dict[str, list[tuple[float, float]]] = {}
    for title, rows in report.tables.items():
        pairs = {str(row["spill"]): _goodputs_and_costs(row) for row in rows}
        for name, own in pairs.items():
            pooled.setdefault(name, []).extend(own)
        _note_comparison(report, title, pairs)
    _note_comparison(report, "all together", pooled)


def _note_comparison(
    report: Report, title: str, pairs: dict[str, list[tuple[float, float]]]
) -> None:
    for name, theirs in pairs.items():
        if not name.startswith(_AT_429):
            continue
        for ours in (_DEFAULT, _LESS_MONEY + name):
            matched = list(zip(pairs[ours], theirs, strict=True))
            gains = [mine[0] - its[0] for mine, its in matched]
            costs = [mine[1] - its[1] for mine, its in matched]
            report.add_note(
                f"{title}: {ours} beside {name}: goodput {_difference(gains)}, cost "
                f"{_difference(costs)} of {np.mean([its[1] for its in theirs]):.4f}: "
                f"{_verdict(interval(gains), interval(costs))}"
            )


def _verdict(gain: tuple[float, float], cost: tuple[float, float]) -> str:
    """Return the verdict in words, by the 95 % intervals of the gain and of the added cost."""
    if (gain[0] > 0.0 and cost[0] <= 0.0) or (cost[1] < 0.0 and gain[1] >= 0.0):
        return "dominated: significantly better in one and not significantly worse in the other"
    if gain[0] > 0.0:
        return "not dominated: the bound has significantly less goodput, at significantly less cost"
    if cost[1] < 0.0:
        return "NOT dominated: the bound has significantly more goodput, at significantly more cost"
    return "neither significantly better nor worse"


def _goodputs_and_costs(row: dict[str, Any]) -> list[tuple[float, float]]:
    goodput, cost = row["goodput"], row["cost"]
    assert isinstance(goodput, Spread)
    assert isinstance(cost, Spread)
    return list(zip(goodput.values, cost.values, strict=True))


def _difference(values: list[float]) -> str:
    low, high = interval(values)
    return f"{np.mean(values):+.4f} ({low:+.4f} to {high:+.4f})"


def _parse() -> argparse.Namespace:
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
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
