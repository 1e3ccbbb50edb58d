"""The simulator against queueing theory: the deployed router, queues for engines, virtual time.

An interval is that of batch means: a run is cut into batches long enough to know little
of one another, and the mean of their means is normal enough (Law, *Simulation Modeling
and Analysis*, 9.5.3). Seeds are fixed, so a test passes always or never.
"""

import math

import numpy as np
import pytest

from router.core.settings import RouterSettings
from router.simulation.events import Network
from router.simulation.journal import Run
from router.simulation.node import Engine
from router.simulation.simulator import Simulation
from router.simulation.workload.workload import Arrival, Workload
from tests.router.simulation.textbook_queues import (
    SERVICE_S,
    FirstComeFirstServed,
    ProcessorSharing,
)

NUM_REQUESTS = 12_000
NUM_BATCHES = 30
_T = 2.045  # Student's t for 29 degrees of freedom, 95 %
# Snapshots at once and without delay: a textbook's server knows what it serves.
INSTANT = Network(submit_s=0.0, reply_s=0.0, snapshot_interval_s=0.0)
# Central queue in order of arrival: engines of one place each, the rest is held.
CENTRAL = RouterSettings(
    policy="least_requests", hold=True, max_held_requests=1 << 40, max_hold_s=1e9
)


def exponential(rng: np.random.Generator) -> np.ndarray:
    return rng.exponential(1.0, NUM_REQUESTS)


def lognormal(rng: np.random.Generator) -> np.ndarray:
    """Mean 1, squared coefficient of variation 2."""
    sigma = math.sqrt(math.log(3.0))
    return rng.lognormal(-(sigma**2) / 2.0, sigma, NUM_REQUESTS)


def simulate(
    rate: float,
    services_s: np.ndarray,
    rng: np.random.Generator,
    num_engines: int = 1,
    engine: type[Engine] = FirstComeFirstServed,
    settings: RouterSettings = CENTRAL,
) -> Run:
    """A Poisson stream of jobs of these sizes."""
    offsets_s = np.cumsum(rng.exponential(1.0 / rate, NUM_REQUESTS))
    workload = Workload.of(
        "poisson",
        (
            Arrival(
                offset_s=float(offset_s),
                num_prompt_tokens=1,
                num_output_tokens=max(1, round(service_s / SERVICE_S)),
            )
            for offset_s, service_s in zip(offsets_s, services_s, strict=True)
        ),
    )
    return Simulation(workload, settings, lambda _: engine(), num_engines, network=INSTANT).run()


def assert_mean(values: np.ndarray, expected: float) -> None:
    """The expected mean lies within the 95 % interval of batch means."""
    values = values[len(values) // 10 :]
    means = np.array([batch.mean() for batch in np.array_split(values, NUM_BATCHES)])
    half_width = _T * means.std(ddof=1) / math.sqrt(NUM_BATCHES)
    assert means.mean() == pytest.approx(expected, abs=half_width)
    assert half_width < 0.25 * expected  # or the test would say nothing


def erlang_c(num_servers: int, offered: float) -> float:
    """Probability of waiting in M/M/c, by the recurrence of Erlang B."""
    blocking = 1.0
    for servers in range(1, num_servers + 1):
        blocking = offered * blocking / (servers + offered * blocking)
    return blocking / (1.0 - offered / num_servers * (1.0 - blocking))


def test_mm1():
    """Mean time in the system: 1 / (mu - lambda)."""
    rng = np.random.default_rng(1)
    run = simulate(0.5, exponential(rng), rng)
    assert_mean(run.e2e_s, 1.0 / (1.0 - 0.5))


@pytest.mark.parametrize("num_engines", [2, 4])
def test_mmc(num_engines):
    """Mean wait in the hold queue: C(c, a) / (c mu - lambda); Erlang 1917."""
    rng = np.random.default_rng(2)
    rate = 0.6 * num_engines
    run = simulate(rate, exponential(rng), rng, num_engines)
    assert_mean(run.hold_s, erlang_c(num_engines, rate) / (num_engines - rate))


def test_mg1():
    """Mean wait: lambda E[S^2] / 2(1 - rho); Pollaczek 1930, Khinchine 1932."""
    rng = np.random.default_rng(3)
    run = simulate(0.5, lognormal(rng), rng)
    assert_mean(run.hold_s, 0.5 * 3.0 / (2.0 * (1.0 - 0.5)))


@pytest.mark.parametrize("service", [exponential, lognormal])
def test_mg1_processor_sharing(service):
    """Mean time in the system: E[S] / (1 - rho), whatever the distribution; Sakata 1971."""
    rng = np.random.default_rng(4)
    at_once = RouterSettings(policy="round_robin")
    run = simulate(0.5, service(rng), rng, engine=ProcessorSharing, settings=at_once)
    assert_mean(run.e2e_s, 1.0 / (1.0 - 0.5))


def test_littles_law():
    """Mean number in the system: arrival rate x mean time in it, to 1 %.

    Counted anew from arrivals and departures, request by request in order of time.
    """
    rng = np.random.default_rng(5)
    run = simulate(0.6 * 4, exponential(rng), rng, 4)
    times_s = np.concatenate([run.arrival_s, run.end_s])
    changes = np.concatenate([np.ones(len(run)), -np.ones(len(run))])
    order = np.argsort(times_s, kind="stable")
    gaps_s = np.diff(times_s[order])
    num_present = (np.cumsum(changes[order])[:-1] * gaps_s).sum() / gaps_s.sum()
    rate = (len(run) - 1) / run.arrival_s[-1]
    assert num_present == pytest.approx(rate * run.e2e_s.mean(), rel=0.01)
