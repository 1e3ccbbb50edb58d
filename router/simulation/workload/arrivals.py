"""When do requests arrive? Drawn: seconds from the start, ascending, [num_requests]."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def poisson(rng: np.random.Generator, rate: float, num_requests: int) -> NDArray[np.float64]:
    """Return independent arrivals at `rate` per second."""
    return np.cumsum(rng.exponential(1.0 / rate, num_requests))


def bursty(
    rng: np.random.Generator, rate: float, cv: float, num_requests: int
) -> NDArray[np.float64]:
    """Return arrivals with gamma-distributed gaps of coefficient of variation `cv`.

    1 is Poisson; above it arrivals cluster (ServeGen, BurstGPT: 1 to 13 in production).
    """
    shape = 1.0 / cv**2
    return np.cumsum(rng.gamma(shape, 1.0 / (rate * shape), num_requests))


def varying(
    rng: np.random.Generator, profile: Sequence[tuple[float, float]]
) -> NDArray[np.float64]:
    """Return Poisson arrivals whose rate follows `profile`, until its last point.

    `profile`: (seconds, requests per second), ascending in time, straight lines between. The
    number of arrivals is drawn, too. Uniform draws are mapped through the inverse of the expected
    count (Çinlar 1975, chapter 4). Raises `ValueError` for a profile that does not ascend.
    """
    times_s, rates = (np.array(column, dtype=float) for column in zip(*profile, strict=True))
    if np.any(np.diff(times_s) < 0.0) or np.any(rates < 0.0):
        raise ValueError("a profile of rates ascends in time and is nowhere negative")
    # The expected count is quadratic between two points; on a fine grid it is nearly linear.
    grid_s = np.unique(np.concatenate([np.linspace(times_s[0], times_s[-1], 10_001), times_s]))
    grid_rates = np.interp(grid_s, times_s, rates)
    steps = np.diff(grid_s) * (grid_rates[1:] + grid_rates[:-1]) / 2.0
    counts = np.concatenate([[0.0], np.cumsum(steps)])
    uniform = np.sort(rng.uniform(0.0, counts[-1], rng.poisson(counts[-1])))
    offsets_s: NDArray[np.float64] = np.interp(uniform, counts, grid_s)
    return offsets_s


def ramp(
    rng: np.random.Generator, start_rate: float, end_rate: float, duration_s: float
) -> NDArray[np.float64]:
    """Return Poisson arrivals whose rate changes linearly."""
    return varying(rng, [(0.0, start_rate), (duration_s, end_rate)])


def spike(
    rng: np.random.Generator, rate: float, factor: float, spike_s: float, duration_s: float
) -> NDArray[np.float64]:
    """Return Poisson arrivals at `rate`, but `factor` times it for `spike_s` in the middle."""
    start_s, end_s = (duration_s - spike_s) / 2.0, (duration_s + spike_s) / 2.0
    return varying(
        rng,
        [
            (0.0, rate),
            (start_s, rate),
            (start_s, rate * factor),
            (end_s, rate * factor),
            (end_s, rate),
            (duration_s, rate),
        ],
    )
