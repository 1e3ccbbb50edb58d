"""Which runs does the comparison consist of, and what comes of one?"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.policies.scaling import rivals, workloads
from router import RouterSettings
from router.fleet.step_budget import ITL_TARGET_S
from router.scaling.autoscaler import Autoscaler
from router.scaling.capacity import load_of
from router.scaling.demand import EngineRates
from router.scaling.settings import ScalingSettings
from router.scaling.simulated import PolicyScaler, Scaler
from router.simulation.engine.model import EngineModel
from router.simulation.engine.profile import Profile
from router.simulation.figures import Slo
from router.simulation.simulator import Simulation
from router.simulation.workload.workload import Workload

MAX_ENGINES = 64
STARTS_S = (30.0, 120.0, 300.0)
OURS, OURS_ROOMY, CLAIRVOYANT = "ours", "ours, more room", "clairvoyant"
# People read about five tokens a second.
SLO = Slo(tpot_s=0.2)
_SERVEGEN, _AZURE = "servegen_m-large", "azure2023_code"
_FIRST_S, _FIRST_LOAD = 120.0, 0.5  # what a run starts with: enough for its first two minutes


@dataclass(frozen=True)
class Outcome:
    """What a run cost, and what it missed."""

    missed: float  # share of all requests without both of what was promised
    refused: float  # share that was not served at all
    engine_hours: float
    most_engines: int
    num_starts: int
    num_recalls: int


def draws(traces: Path | None) -> dict[str, Callable[[int], Workload]]:
    """Return what draws each workload from a seed; traces that are not there are left out."""
    found: dict[str, Callable[[int], Workload]] = {}
    files = sorted(traces.iterdir()) if traces is not None and traces.is_dir() else []
    for file in files:
        if file.name.startswith(_AZURE):
            found["azure-code, 6 copies"] = workloads.copies(file, 6, 1_200.0)
        elif file.name.startswith(_SERVEGEN):
            found["servegen, 8 copies"] = workloads.copies(file, 8, 1_800.0)
    return {
        **found,
        "days of one hour": partial(workloads.day, 6.0),
        "10x spike of 5 min": partial(workloads.spike, 2.0),
    }


def scalers(
    workload: Workload, rates: EngineRates, start_s: float, season_s: float
) -> Iterator[tuple[str, Scaler]]:
    """Yield each autoscaler by its name and setting."""
    for name, options in ((OURS, {}), (OURS_ROOMY, {"goodput": 0.98, "max_load": 0.5})):
        # The start's time is measured by itself from the first one on; this is its guess.
        settings = ScalingSettings(min=1, max=MAX_ENGINES, season_s=season_s, **options)
        yield name, PolicyScaler(Autoscaler(settings))
    for target in (8.0, 24.0):
        yield f"Ray Serve, {target:g} ongoing", rivals.RayDefault(target, MAX_ENGINES)
    for usage in (0.15, 0.3):
        yield f"KV {usage:g} and queue", rivals.Reactive(usage, MAX_ENGINES)
    keep_s = max(60.0, start_s)
    for load in (0.4, 0.6):
        yield f"token rate, load {load:g}", rivals.TokenRate(load, MAX_ENGINES, keep_s)
    yield CLAIRVOYANT, rivals.Clairvoyant(workload, rates, start_s, 0.5, MAX_ENGINES)


def simulate(
    workload: Workload, profile: Profile, scaler: Scaler, rates: EngineRates, start_s: float
) -> Outcome:
    """Return what comes of a workload under an autoscaler. Simulated."""
    simulation = Simulation(
        workload,
        RouterSettings(),
        lambda rng: EngineModel(profile, rng, itl_target_s=ITL_TARGET_S),
        num_initial(workload, rates),
        scaler=scaler,
        start_s=start_s,
    )
    run = simulation.run()
    assert simulation.elastic is not None
    elasticity = simulation.elastic.elasticity
    return Outcome(
        missed=float(1.0 - SLO.met(run).mean()),
        refused=float(1.0 - run.completed.mean()),
        engine_hours=elasticity.engine_s / 3_600.0,
        most_engines=elasticity.most_engines,
        num_starts=elasticity.num_starts,
        num_recalls=elasticity.num_recalls,
    )


def num_initial(workload: Workload, rates: EngineRates) -> int:
    """Return how many engines the first minutes need: every run starts with them."""
    first = [each for each in workload.arrivals if each.offset_s < _FIRST_S]
    load = load_of(
        rates,
        sum(each.num_prompt_tokens for each in first) / _FIRST_S,
        sum(each.num_output_tokens for each in first) / _FIRST_S,
    )
    return max(1, math.ceil(load / _FIRST_LOAD))


def measured_rates(workload: Workload, profile: Profile) -> EngineRates:
    """Return what a router learns of the engines, from a short run: for who is not to learn it."""
    part = workload.part(0, min(len(workload), 2_000))
    simulation = Simulation(
        part,
        RouterSettings(),
        lambda rng: EngineModel(profile, rng, itl_target_s=ITL_TARGET_S),
        8,
    )
    simulation.run()
    rates = rivals.demand_of(simulation).rates
    assert rates is not None
    return rates
