"""Several simulated gateways before the same engines, who know little of one another."""

import numpy as np
import pytest

from router.core.settings import RouterSettings
from router.fleet.step_budget import ITL_TARGET_S
from router.simulation.engine.model import EngineModel
from router.simulation.events import Network
from router.simulation.simulator import Simulation
from router.simulation.workload.synthetic import SYNTHETIC
from router.simulation.workload.workload import Workload
from router.types import SNAPSHOT_INTERVAL_S
from tests.support.builders import small_profile

BURSTY = SYNTHETIC["bursty"](400, 5).at_rate(130.0)
# As it would be if engines told the others' bookings with the next snapshot, and took everything.
BLIND = Network(booking_interval_s=SNAPSHOT_INTERVAL_S, gate=False)


def simulation(
    num_gateways: int,
    network: Network | None = None,
    *,
    workload: Workload = BURSTY,
    num_engines: int = 6,
    eager: bool = False,
) -> Simulation:
    return Simulation(
        workload,
        RouterSettings(),
        lambda rng: EngineModel(small_profile(), rng, itl_target_s=ITL_TARGET_S),
        num_engines,
        num_gateways=num_gateways,
        network=network,
        eager=eager,
    )


def num_bounced(simulated: Simulation) -> int:
    states = [gateway.router.state(simulated.now_s) for gateway in simulated.gateways]
    return sum(state.retries.num_bounced for state in states)


def test_what_engines_give_back_is_never_lost_nor_counted_twice():
    simulated = simulation(6)
    run = simulated.run()
    assert run.completed.all()
    assert num_bounced(simulated) > 20
    for gateway in simulated.gateways:
        state = gateway.router.state(simulated.now_s)
        assert state.num_placed == state.held.num_requests == 0
        assert state.retries.num_made == 0
        assert state.breaker_events == []
        assert all(each.ledger.num_open == 0 for each in state.replicas.values())


def test_first_tokens_come_nearly_as_soon_as_with_one_gateway():
    """Where engines are many, so that most of what comes between two snapshots is of others."""
    workload = SYNTHETIC["poisson"](400, 5).at_rate(352.0)
    one, several, blind = (
        np.mean(simulation(number, network, workload=workload, num_engines=16).run().ttft_s)
        for number, network in ((1, None), (8, None), (8, BLIND))
    )
    assert several - one < 0.5 * (blind - one)


@pytest.mark.parametrize("network", [None, BLIND])
def test_running_ahead_changes_nothing(network):
    one, other = (simulation(3, network, eager=eager).run() for eager in (False, True))
    for column in ("placed_s", "first_s", "end_s", "outcome"):
        assert np.array_equal(getattr(one, column), getattr(other, column), equal_nan=True)


def test_one_gateway_is_never_given_anything_back():
    with_gate, without = simulation(1), simulation(1, BLIND)
    assert np.array_equal(with_gate.run().end_s, without.run().end_s)
    assert num_bounced(with_gate) == 0
