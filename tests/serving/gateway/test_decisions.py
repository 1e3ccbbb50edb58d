"""Every kind of decision in the gateway's driver, and hedging there as in the simulator."""

import asyncio
import random
from typing import get_args

import pytest

import router.simulation.gateway as simulated
import serving.gateway.driver as driver
from router.core.settings import RouterSettings
from router.simulation.engine.model import EngineModel
from router.simulation.simulator import Simulation
from router.simulation.workload.synthetic import SYNTHETIC
from router.types import (
    Decision,
    Dispatch,
    Evacuate,
    Fail,
    Fallback,
    Hold,
    Reject,
    Withdraw,
)
from tests.support.builders import small_profile
from tests.support.provider_server import configured
from tests.support.provider_server import serving as provider_serving
from tests.support.running_gateway import CHAT, System, running


@pytest.fixture
def decided(monkeypatch) -> list[Decision]:
    """What the routers of gateways, deployed and simulated, decide from here on."""
    decisions: list[Decision] = []
    for shell in (driver, simulated):

        def noted(made, gateway, carry_out=shell.carry_out):
            decisions.extend(made)
            carry_out(made, gateway)

        monkeypatch.setattr(shell, "carry_out", noted)
    return decisions


def kinds(decisions: list[Decision]) -> set[type]:
    return {type(each) for each in decisions}


def close_gates(system: System) -> None:
    for engine in system.engines:
        engine.gate.clear()


async def asked(system: System, **fields) -> asyncio.Task:
    """A request that an engine has."""
    task = asyncio.create_task(system.client.post(CHAT, json=system.chat(**fields)))
    await system.until(lambda: system.num_engine_streams == 1)
    return task


async def test_holding_and_refusing(decided):
    async with running(num_engines=0, router={"max_held_requests": 1}) as system:
        held = asyncio.create_task(system.client.post(CHAT, json=system.chat(max_tokens=1)))
        await system.until(lambda: system.gateway.state().held.num_requests == 1)
        assert (await system.client.post(CHAT, json=system.chat())).status_code == 429
        await system.add_engine()
        assert (await held).status_code == 200
        assert kinds(decided) == {Hold, Reject, Dispatch}
        system.assert_empty()


async def test_giving_up(decided):
    async with running(num_engines=1, router={"max_attempts": 1}) as system:
        system.engines[0].status = 500
        reply = await system.client.post(CHAT, json=system.chat())
        assert reply.status_code == 502
        assert kinds(decided) == {Dispatch, Withdraw, Fail}
        system.assert_empty()


async def test_leaving_an_engine_that_hangs(decided):
    async with running(num_engines=3, router={"hang_s": 1.0}) as system:
        close_gates(system)
        task = await asked(system, max_tokens=1)
        (index,) = (i for i, server in enumerate(system.servers) if server.num_streams)
        for engine in (*system.engines[:index], *system.engines[index + 1 :]):
            engine.gate.set()
        reply = await task
        assert reply.status_code == 200
        assert kinds(decided) == {Dispatch, Evacuate}
        assert system.engines[index].num_cancelled == 1
        system.assert_empty()


async def test_falling_back(decided):
    async with (
        provider_serving() as server,
        running(num_engines=0, **configured(server)) as system,
    ):
        assert (await system.client.post(CHAT, json=system.chat())).status_code == 200
        assert kinds(decided) == {Fallback}
        system.assert_empty()


def shape(decisions: list[Decision]) -> list[tuple[str, int]]:
    """Kinds of decisions, each with its engine by the order in which they come up."""
    order: dict[str, int] = {}
    return [
        (type(each).__name__, order.setdefault(each.replica_id, len(order))) for each in decisions
    ]


async def test_hedging_is_the_same_deployed_and_simulated(decided):
    """One late request: a second engine gets it, answers, and the first is told to stop."""
    async with running(router={"hedge_factor": 2.0}) as system:
        close_gates(system)
        task = await asked(system, max_tokens=3)
        (first,) = (i for i, server in enumerate(system.servers) if server.num_streams)
        await system.until(lambda: system.num_engine_streams == 2)
        system.engines[1 - first].gate.set()
        assert (await task).status_code == 200
        deployed = system.gateway.state().hedges
        system.assert_empty()
    in_driver, decided[:] = shape(decided), []

    profile = small_profile()
    engines: list[EngineModel] = []

    def make_engine(rng: random.Random) -> EngineModel:
        engines.append(EngineModel(profile, rng))
        return engines[-1]

    settings = RouterSettings(hedge_factor=2.0, hang_s=1e9)
    simulation = Simulation(SYNTHETIC["poisson"](1, 0), settings, make_engine, 2)
    # The first engine, whichever it is, takes its first step for ever.
    begin_step = EngineModel.begin_step

    def begin_slowly(engine: EngineModel, now_s: float, until_s: float) -> float | None:
        engine.slowness = 1e6 if not any(each.step_ends_s for each in engines) else 1.0
        return begin_step(engine, now_s, until_s)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineModel, "begin_step", begin_slowly)
        run = simulation.run()
    assert run.completed.all()
    assert simulation.gateways[0].router.state(simulation.now_s).hedges == deployed
    assert shape(decided) == in_driver == [("Dispatch", 0), ("Dispatch", 1), ("Withdraw", 0)]


def test_no_kind_is_left_out():
    named = {Dispatch, Withdraw, Hold, Fallback, Reject, Fail, Evacuate}
    assert named == set(get_args(Decision))
