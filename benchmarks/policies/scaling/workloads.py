"""Which traffic? Bursts, a slow rise, days, and a spike that nobody foresees."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from router.simulation.workload import arrivals
from router.simulation.workload.lengths import LogNormal
from router.simulation.workload.synthetic import of
from router.simulation.workload.workload import Workload
from serving.capacity.traces import read_trace

# A day in one hour: night, morning, noon, afternoon, evening; of the highest rate.
DAY_S = 3_600.0
_DAY = ((0.0, 0.15), (0.25, 0.12), (0.38, 0.85), (0.5, 0.7), (0.62, 1.0), (0.8, 0.55), (1.0, 0.15))
_NUM_DAYS = 2
_SPIKE = 10.0
_PROMPTS = LogNormal(900.0, 0.9, high=12_000)
_REPLIES = LogNormal(120.0, 0.9, high=2_000)


def day(rate: float, seed: int) -> Workload:
    """Return two days of one hour each, whose heights differ by some percent."""
    rng = np.random.default_rng(seed)
    points = []
    for number in range(_NUM_DAYS):
        height = rate * float(rng.uniform(0.95, 1.05))
        points += [((number + share) * DAY_S, height * level) for share, level in _DAY[:-1]]
    points.append((_NUM_DAYS * DAY_S, rate * _DAY[-1][1]))
    return of("day", arrivals.varying(rng, points), seed, _PROMPTS, _REPLIES)


def spike(rate: float, seed: int) -> Workload:
    """Return forty minutes in which ten times as many come for five."""
    rng = np.random.default_rng(seed)
    return of("spike", arrivals.spike(rng, rate, _SPIKE, 300.0, 2_400.0), seed, _PROMPTS, _REPLIES)


def copies(path: Path, num_copies: int, duration_s: float) -> Callable[[int], Workload]:
    """Return what draws from a trace: so many copies at its own speed, for so long."""
    base = read_trace(path, 0)

    def draw(seed: int) -> Workload:
        rate = base.rate * num_copies
        return base.drawn(rate, round(rate * duration_s), seed, num_copies)

    return draw
