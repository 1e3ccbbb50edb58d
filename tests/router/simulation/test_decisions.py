"""Every kind of decision in the simulator, and what becomes of the requests."""

import random
from typing import get_args

import pytest

import router.simulation.gateway as shell
from router.providers.settings import ProviderSettings
from router.settings import RouterSettings
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


@pytest.fixture
def decided(monkeypatch) -> list[Decision]:
    """What the routers of simulations decide from here on."""
    decisions: list[Decision] = []
    carry_out = shell.carry_out

    def noted(made, gateway):
        decisions.extend(made)
        carry_out(made, gateway)

    monkeypatch.setattr(shell, "carry_out", noted)
    return decisions


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


def test_holding_and_refusing(decided):
    run = simulation(rate=400.0, max_held_requests=5).run()
    kinds = {type(each) for each in decided}
    assert kinds == {Dispatch, Hold, Reject}
    assert run.has(Outcome.REJECTED).sum() == sum(isinstance(each, Reject) for each in decided)
    assert (run.completed | run.has(Outcome.REJECTED)).all()


def test_hedging_away_from_an_engine_that_stalls(decided):
    """Requests on the slow engine get their first token from the other, by a hedge."""
    options = {"slownesses": (400.0, 1.0), "policy": "round_robin", "stale_s": 1e9, "hang_s": 1e9}
    hedged = simulation(hedge_factor=3.0, **options)
    run = hedged.run()
    assert {type(each) for each in decided} == {Dispatch, Withdraw}
    hedges = hedged.gateways[0].router.state(hedged.now_s).hedges
    num_withdrawn = sum(isinstance(each, Withdraw) for each in decided)
    assert hedges.num_made == num_withdrawn > 10
    assert 10 < hedges.num_won <= hedges.num_made
    assert hedges.num_open == 0
    assert run.completed.all()
    for node in hedged.nodes.values():
        assert not hedged.gateways[0].has_streams(node)
    alone = simulation(**options).run()
    saved = [
        int(each.request_id)
        for each in decided
        if isinstance(each, Withdraw) and each.replica_id == "engine-0000"
    ]
    assert len(saved) == hedges.num_won
    first = saved[0]  # until then both runs are the same
    assert run.ttft_s[first] < 0.5 * alone.ttft_s[first]


def test_leaving_an_engine_that_hangs(decided):
    """A step that takes 5 s is far beyond what is predicted: its requests go elsewhere."""
    run = simulation(slownesses=(1000.0, 1.0, 1.0), policy="round_robin", hang_s=1.0).run()
    assert {type(each) for each in decided} >= {Dispatch, Evacuate}
    assert run.completed.all()


def test_giving_up(decided):
    """All the moves that there may be are lost with their engine."""
    failures = [Failure(engine=0, at_s=2.0 + 0.3 * number, down_s=0.1) for number in range(6)]
    run = simulation(slownesses=(1.0,), rate=40.0, failures=failures, max_attempts=1).run()
    num_failed = sum(isinstance(each, Fail) for each in decided)
    assert run.has(Outcome.FAILED).sum() == num_failed > 0
    refused = run.has(Outcome.REJECTED)  # under which it was lost twice
    assert (run.completed | run.has(Outcome.FAILED) | refused).all()


def test_falling_back(decided):
    """With the only engine gone for long, all go to the provider but those that had begun."""
    failures = [Failure(engine=0, at_s=2.0, down_s=1000.0)]
    options = {"slownesses": (1.0,), "providers": [provider()], "failures": failures}
    run = simulation(**options).run()
    assert sum(isinstance(each, Fallback) for each in decided) > 100
    assert run.completed.sum() > 180
    had_begun = run.first_s <= 2.0
    assert (run.completed | had_begun).all()


def test_no_kind_is_left_out():
    named = {Dispatch, Withdraw, Hold, Fallback, Reject, Fail, Evacuate}
    assert named == set(get_args(Decision))
