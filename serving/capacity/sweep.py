"""What do many simulated runs give? Workloads × fleets × loads × policies, on all cores."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.pool import Pool
from typing import Any

import numpy as np

from router import RouterSettings
from router.simulation import clairvoyant
from router.simulation.engine.model import EngineModel
from router.simulation.engine.profile import Profile
from router.simulation.events import NeedsSnapshots, Network
from router.simulation.figures import Figures, Slo, figures_of
from router.simulation.journal import Run
from router.simulation.simulator import Simulation, can_do_without_snapshots
from router.simulation.variant import SATURATING_POLICY, split
from router.simulation.workload.workload import Workload

# The part of a run at whose start all requests are there. Before it the engines fill, and prefill
# more than they decode; after it they run out of work.
_FULL = (0.3, 0.7)


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
    variant: str  # a policy, ours without parts, or the clairvoyant reference
    repeat: int
    seed: int


def simulate(
    workload: Workload,
    fleet: Fleet,
    variant: str,
    *,
    seed: int = 0,
    settings: RouterSettings | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Run:
    """Simulate one run of the workload, unscaled. `settings`: of the router, but for its policy."""
    segment_tokens = _segment_tokens(workload, fleet.profile)
    if variant == clairvoyant.NAME:
        return clairvoyant.run_clairvoyant(
            workload, fleet.profile, fleet.num_engines, seed=seed, segment_tokens=segment_tokens
        )
    policy, parts = split(variant)
    options = (settings or RouterSettings()).model_dump()
    of_run = RouterSettings(**options | {"policy": policy, "ablate": parts, "seed": seed})
    make = partial(
        Simulation,
        workload,
        of_run,
        lambda rng: EngineModel(
            fleet.profile, rng, caps_prefill=True, segment_tokens=segment_tokens
        ),
        fleet.num_engines,
        num_gateways=fleet.num_gateways,
        network=fleet.network or Network(submit_s=fleet.profile.path_s),
        segment_tokens=segment_tokens,
        contention=fleet.profile.contention,
        seed=seed,
        on_progress=on_progress,
    )
    if can_do_without_snapshots(of_run):
        with contextlib.suppress(NeedsSnapshots):
            return make(reports=False).run()
    return make().run()


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


_UNBOUNDED = RouterSettings(
    max_held_requests=1 << 40, max_held_tokens=1 << 50, max_held_bytes=1 << 60, max_hold_s=1e9
)


class Sweep:
    """Runs with the same profile and the same workloads, in several processes."""

    def __init__(
        self,
        workloads: dict[str, Workload],
        profile: Profile,
        slo: Slo,
        *,
        num_gateways: int = 1,
        num_processes: int | None = None,
    ) -> None:
        self._shared = (workloads, profile, slo, num_gateways)
        self._num_processes = num_processes or len(os.sched_getaffinity(0))
        self._pool: Pool | None = None

    def __enter__(self) -> "Sweep":
        context = get_context("forkserver")
        self._pool = context.Pool(self._num_processes, _share, (self._shared,))
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._pool is not None
        self._pool.terminate()

    def capacities(self, wanted: Sequence[tuple[str, int]]) -> Iterator[float]:
        """Yield the capacity of each (workload, number of engines), in their order."""
        assert self._pool is not None
        yield from self._pool.imap(_capacity, wanted)

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


def _capacity(wanted: tuple[str, int]) -> float:
    workloads, profile, _, _ = _shared
    name, num_engines = wanted
    return simulated_capacity(workloads[name], Fleet(profile, num_engines))


def _figures(case: Case) -> Figures:
    workloads, profile, slo, num_gateways = _shared
    workload = workloads[case.workload].at_rate(case.rate)
    fleet = Fleet(profile, case.num_engines, num_gateways)
    run = simulate(workload, fleet, case.variant, seed=case.seed)
    return figures_of(run, slo)


def _timed(case: Case) -> tuple[Case, Figures, float]:
    began_s = time.process_time()
    figures = _figures(case)
    return case, figures, time.process_time() - began_s


def _segment_tokens(workload: Workload, profile: Profile) -> int:
    """Return the tokens per block of the simulated caches: no fewer than per id of the workload."""
    sizes = {each.prefix_block_tokens for each in workload.arrivals if each.prefix_ids}
    size = min(sizes, default=profile.block_size)
    return size if size % profile.block_size == 0 else profile.block_size
