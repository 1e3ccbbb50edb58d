"""Every kind of decision in the simulator, and what becomes of the requests."""

import random
from typing import get_args

import numpy as np

from router import RouterState
from router.core.settings import RouterSettings
from router.providers.settings import ProviderSettings
from router.simulation.engine.model import EngineModel
from router.simulation.provider import ProviderModel
from router.simulation.simulator import Failure, Simulation
from router.simulation.workload.synthetic import SYNTHETIC
from router.types import (
    Decision,
    Dispatch,
    Evacuate,
    Fail,
    Fallback,
    Hold,
    Outcome,
    Reject,
    Withdraw,
)
from tests.support.builders import small_profile

WORKLOAD = SYNTHETIC["poisson"](200, 0)


def state_of(simulated: Simulation) -> RouterState:
    """What its only router has decided and seen."""
    return simulated.gateways[0].router.state(simulated.now_s)


def simulation(*, slownesses=(1.0, 1.0), rate=5.0, providers=(), failures=(), **settings):
    """Engines of which each takes so many times as long as the profile says."""
    left = list(slownesses)

    def make_engine(rng: random.Random) -> EngineModel:
        engine = EngineModel(small_profile(), rng)
        engine.slowness = left.pop(0) if left else 1.0
        return engine

    return Simulation(
        WORKLOAD.at_rate(rate),
        RouterSettings(**settings),
        make_engine,
        len(slownesses),
        providers=providers,
        failures=failures,
    )


def provider() -> ProviderModel:
    settings = {"name": "p0", "models": {"small": "theirs"}, "keys": [{"rpm": 10_000}]}
    return ProviderModel(
        ProviderSettings.model_validate(settings),
        random.Random(0),
        ttft_s=0.2,
        ttft_sigma=0.1,
        tpot_s=0.01,
        rpm=10_000,
        tpm=10**9,
    )


def test_holding_and_refusing():
    full = simulation(rate=400.0, max_held_requests=5)
    run = full.run()
    refused = run.has(Outcome.REJECTED)
    assert state_of(full).outcomes["rejected"] == refused.sum() > 0
    assert (run.completed | refused).all()
    held_s = (run.placed_s - run.arrival_s)[run.completed]
    assert (held_s == 0.0).any()
    assert (held_s > 0.0).any()


def test_hedging_away_from_an_engine_that_stalls():
    """Requests on the slow engine get their first token from the other, by a hedge."""
    options = {"slownesses": (800.0, 1.0), "policy": "round_robin", "stale_s": 1e9, "hang_s": 1e9}
    hedged = simulation(hedge_factor=3.0, **options)
    run = hedged.run()
    hedges = state_of(hedged).hedges
    assert 10 < hedges.num_won <= hedges.num_made
    assert hedges.num_open == 0
    assert run.completed.all()
    for node in hedged.nodes.values():  # whichever came second was withdrawn
        assert not hedged.gateways[0].has_streams(node)
    alone = simulation(**options).run()
    (saved,) = np.nonzero(run.ttft_s < 0.5 * alone.ttft_s)
    assert len(saved) > 10
    (changed,) = np.nonzero(run.ttft_s != alone.ttft_s)
    assert changed[0] == saved[0]  # until then both runs are the same


def test_leaving_an_engine_that_hangs():
    """A step that takes 5 s is far beyond what is predicted: its requests go elsewhere."""
    left = simulation(slownesses=(1000.0, 1.0, 1.0), policy="round_robin", hang_s=1.0)
    run = left.run()
    assert "hung" in {event.reason for event in state_of(left).breaker_events}
    assert run.completed.all()


def test_giving_up():
    """All the moves that there may be are lost with their engine."""
    failures = [Failure(engine=0, at_s=2.0 + 0.3 * number, down_s=0.1) for number in range(6)]
    poor = simulation(slownesses=(1.0,), rate=40.0, failures=failures, max_attempts=1)
    run = poor.run()
    assert state_of(poor).outcomes["failed"] == run.has(Outcome.FAILED).sum() > 0
    refused = run.has(Outcome.REJECTED)  # under which it was lost twice
    assert (run.completed | run.has(Outcome.FAILED) | refused).all()


def test_falling_back():
    """With the only engine gone for long, all go to the provider but those that had begun."""
    failures = [Failure(engine=0, at_s=2.0, down_s=1000.0)]
    gone = simulation(slownesses=(1.0,), providers=[provider()], failures=failures)
    run = gone.run()
    assert state_of(gone).fallback.num_spilled > 100
    assert run.completed.sum() > 180
    had_begun = run.first_s <= 2.0
    assert (run.completed | had_begun).all()


def test_no_kind_is_left_out():
    named = {Dispatch, Withdraw, Hold, Fallback, Reject, Fail, Evacuate}
    assert named == set(get_args(Decision))
