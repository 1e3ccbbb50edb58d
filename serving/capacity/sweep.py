"""What do many simulated runs give? Workloads × fleets × loads × policies, on all cores."""

import contextlib
import gc
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.pool import Pool
from typing import Any

import numpy as np

from router import RouterSettings
from router.estimators.lengths.forecast import Lengths
from router.fleet.step_budget import ITL_TARGET_S
from router.simulation import clairvoyant
from router.simulation.engine.model import EngineModel
from router.simulation.engine.profile import Profile
from router.simulation.engine.unloaded import UnloadedTimes
from router.simulation.events import NeedsSnapshots, Network
from router.simulation.figures import STEADY, WARM, Figures, Promises, Slo, figures_of
from router.simulation.journal import Run
from router.simulation.simulator import Simulation, can_do_without_snapshots
from router.simulation.variant import SATURATING_POLICY, STOCK, on_stock, split
from router.simulation.workload.workload import Workload
from serving.gateway.intake.length.weights import shipped_lengths

# The part of a run at whose start all requests are there. Before it the engines fill, and prefill
# more than they decode; after it they run out of work.
_FULL = (0.3, 0.7)
_FILLS = 5
# Where waits are steep: they are so many times those at so small a load. Halved five times, the
# rest is known to 2 % of the capacity.
_STEEP = 3.0
_LOW_LOAD = 0.3
_NUM_HALVINGS = 5
_MIN_TURNS = 20.0


@dataclass(frozen=True)
class Fleet:
    """The engines and gateways of a run."""

    profile: Profile
    num_engines: int
    num_gateways: int = 1
    network: Network | None = None  # unset: by the profile


@dataclass(frozen=True)
class Case:
    """One run to make."""

    workload: str  # its key among the sweep's
    num_engines: int
    load: float  # share of the capacity
    rate: float  # requests per second
    variant: str  # a policy, ours without parts, or the clairvoyant reference; and the engines
    repeat: int
    seed: int
    num_requests: int | None = None  # drawn from the workload; unset: all of it
    num_copies: int | None = None  # they are drawn from; unset: as many as keep its own speed


def simulate(
    workload: Workload,
    fleet: Fleet,
    variant: str,
    *,
    seed: int = 0,
    settings: RouterSettings | None = None,
    on_progress: Callable[[int], None] | None = None,
    make_lengths: Callable[[], Lengths] | None = None,
) -> Run:
    """Simulate one run of the workload, unscaled. `settings`: of the router, but for its policy.

    `make_lengths`: what each gateway asks for the lengths of answers, instead of what services
    ask. Of texts that are there: simulated requests have none.

    Engines are set as Headway sets them, or as vLLM comes: first come, first served, prompts in
    chunks of a whole step.
    """
    segment_tokens = _segment_tokens(workload, fleet.profile)
    variant, is_stock = on_stock(variant)
    if variant == clairvoyant.NAME:
        return clairvoyant.run_clairvoyant(
            workload, fleet.profile, fleet.num_engines, seed=seed, segment_tokens=segment_tokens
        )
    policy, parts = split(variant)
    options = (settings or RouterSettings()).model_dump()
    of_run = RouterSettings(**options | {"policy": policy, "ablate": parts, "seed": seed})
    profile, itl_target_s = fleet.profile, None
    if is_stock:
        profile = profile.model_copy(update={"max_prefill_chunk": 0})
    else:  # a CPU's steps take longer than any target: there a fixed chunk stands for it
        itl_target_s = 0.0 if profile.max_prefill_chunk else ITL_TARGET_S
    make = partial(
        Simulation,
        workload,
        of_run,
        lambda rng: EngineModel(
            profile,
            rng,
            priority=not is_stock,
            itl_target_s=itl_target_s,
            segment_tokens=segment_tokens,
        ),
        fleet.num_engines,
        num_gateways=fleet.num_gateways,
        network=fleet.network or Network(submit_s=fleet.profile.path_s),
        segment_tokens=segment_tokens,
        contention=fleet.profile.contention,
        seed=seed,
        on_progress=on_progress,
    )
    # The parts of a run know one another, and nothing else goes in circles.
    collects = gc.isenabled()
    gc.disable()
    try:
        if make_lengths is None and can_do_without_snapshots(of_run):
            with contextlib.suppress(NeedsSnapshots):
                return make(reports=False).run()
        simulation = make()
        for gateway in simulation.gateways:
            gateway.router.use_lengths((make_lengths or shipped_lengths)())
        return simulation.run()
    finally:
        if collects:
            gc.enable()
            gc.collect(0)  # the run that is over


def simulated_capacity(workload: Workload, fleet: Fleet, seed: int = 0) -> float:
    """Return the requests per second that a saturated fleet completes of this workload.

    Simulated, in virtual time: every request is there from the start, and completions count while
    the engines are full. `benchmarks.load.capacity.measured_capacity` answers the same question for
    running engines, by sending requests to them.
    """
    run = simulate(workload.at_once(), fleet, SATURATING_POLICY, seed=seed, settings=_UNBOUNDED)
    ends_s = np.sort(run.end_s[run.completed])
    first, last = (int(share * len(ends_s)) for share in _FULL)
    return (last - first) / (ends_s[last] - ends_s[first])


def knee_rate(
    workload: Workload, fleet: Fleet, num_requests: int, num_copies: int | None, seed: int = 0
) -> float:
    """Return the highest rate at which waits are not yet steep, requests per second.

    There the p99 of TTFT is at most `_STEEP` times that at a small part of the capacity, under
    what an operator would use without Headway. Found by bisection between that part and all.
    """
    capacity = simulated_capacity(_saturating(workload, fleet.profile), _of_two(fleet), seed)
    low, high = (share * capacity * fleet.num_engines / 2.0 for share in (_LOW_LOAD, 1.0))

    # Long enough for waits to show: many times what a request takes by itself.
    alone_s = _mean_unloaded_s(workload, fleet.profile)

    def ttft_p99_s(rate: float) -> float:
        num_drawn = max(num_requests, math.ceil(_MIN_TURNS * alone_s * rate))
        drawn = workload.drawn(rate, num_drawn, seed, num_copies)
        run = simulate(drawn, fleet, SATURATING_POLICY + STOCK, seed=seed, settings=_UNBOUNDED)
        first, last = (int(share * len(run)) for share in STEADY)
        return float(np.percentile(run.ttft_s[first:last], 99))

    limit_s = _STEEP * ttft_p99_s(low)
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2.0
        if ttft_p99_s(middle) <= limit_s:
            low = middle
        else:
            high = middle
    return low


def _mean_unloaded_s(workload: Workload, profile: Profile) -> float:
    """Return how long a request takes on an idle engine, on average."""
    prompts = np.array([each.num_prompt_tokens for each in workload.arrivals])
    outputs = np.array([each.num_output_tokens for each in workload.arrivals])
    return float(UnloadedTimes.of(prompts, outputs, profile).whole_s.mean())


def _of_two(fleet: Fleet) -> Fleet:
    """Return two engines of the fleet: a capacity is in proportion, and theirs is soon found."""
    return replace(fleet, num_engines=2)


def _saturating(workload: Workload, profile: Profile) -> Workload:
    """Return as much of a workload's beginning as keeps two engines full for long.

    Requests for so many times their KV caches; with fewer the engines would still be filling up,
    and decode little, while it counts.
    """
    left = 2 * _FILLS * profile.num_kv_tokens
    for number, each in enumerate(workload.arrivals, start=1):
        left -= each.num_prompt_tokens + each.num_output_tokens
        if left <= 0:
            return workload.part(0, number)
    return workload


_UNBOUNDED = RouterSettings(
    max_held_requests=1 << 40, max_held_tokens=1 << 50, max_held_bytes=1 << 60, max_hold_s=1e9
)


class Sweep:
    """Runs with the same profile and the same workloads, in several processes."""

    def __init__(
        self,
        workloads: dict[str, Workload],
        profile: Profile,
        slo: Slo | Promises,
        *,
        num_gateways: int = 1,
        window: tuple[float, float] = WARM,
        num_processes: int | None = None,
    ) -> None:
        self._shared = (workloads, profile, slo, num_gateways, window)
        self._num_processes = num_processes or len(os.sched_getaffinity(0))
        self._pool: Pool | None = None

    def __enter__(self) -> "Sweep":
        context = get_context("forkserver")
        self._pool = context.Pool(self._num_processes, _share, (self._shared,))
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._pool is not None
        self._pool.terminate()

    def knees(self, wanted: Sequence[tuple[str, int, int, int | None]]) -> Iterator[float]:
        """Yield the knee of each (workload, number of engines, of requests, of copies), in order.

        In requests per second: `knee_rate`.
        """
        assert self._pool is not None
        yield from self._pool.imap(_knee, wanted)

    def run(self, cases: Sequence[Case]) -> Iterator[tuple[Case, Figures, float]]:
        """Yield each case, its figures and its CPU seconds, in the order of their ends."""
        assert self._pool is not None
        yield from self._pool.imap_unordered(_timed, cases)

    def figures(self, cases: Sequence[Case]) -> Iterator[Figures]:
        """Yield the figures of each case, in their order."""
        assert self._pool is not None
        yield from self._pool.imap(_figures, cases)


# What all runs share, in each process of a sweep.
_shared: Any = None


def _share(shared: Any) -> None:
    global _shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    _shared = shared


def _knee(wanted: tuple[str, int, int, int | None]) -> float:
    workloads, profile, _, num_gateways, _ = _shared
    name, num_engines, num_requests, num_copies = wanted
    fleet = Fleet(profile, num_engines, num_gateways)
    return knee_rate(workloads[name], fleet, num_requests, num_copies)


def _figures(case: Case) -> Figures:
    workloads, profile, slo, num_gateways, window = _shared
    workload: Workload = workloads[case.workload]
    if case.num_requests is None:
        workload = workload.at_rate(case.rate)
    else:
        workload = workload.drawn(case.rate, case.num_requests, case.seed, case.num_copies)
    fleet = Fleet(profile, case.num_engines, num_gateways)
    run = simulate(workload, fleet, case.variant, seed=case.seed)
    unloaded = UnloadedTimes.of(run.num_prompt_tokens, run.num_output_tokens, profile)
    figures = figures_of(run, slo, unloaded=unloaded, window=window)
    return figures | {"time_scale": workload.scale, "num_copies": float(workload.num_copies)}


def _timed(case: Case) -> tuple[Case, Figures, float]:
    began_s = time.process_time()
    figures = _figures(case)
    return case, figures, time.process_time() - began_s


def _segment_tokens(workload: Workload, profile: Profile) -> int:
    """Return the tokens per block of the simulated caches: no fewer than per id of the workload."""
    sizes = {each.prefix_block_tokens for each in workload.arrivals if each.prefix_ids}
    size = min(sizes, default=profile.block_size)
    return size if size % profile.block_size == 0 else profile.block_size
