"""Does an engine get a request's deadline as its priority, and go by it? Over the real stream."""

import asyncio
import time

import pytest
from starlette.types import Receive, Scope, Send

from router.simulation.engine.profile import Profile
from serving.capacity.profiles import save_profile
from serving.engine.emulated.engine import EmulatedArgs, EmulatedEngine
from serving.stream.accounting import RequestAccounting, current_accounting
from tests.serving.gateway.tenants.office import Office
from tests.support.asgi_caller import Caller
from tests.support.fakes import FakeEngine
from tests.support.running_gateway import CHAT, System, running

# First tokens are due 10 s after their arrival, however long the prompt is.
TARGETS = {"ttft_target_base_s": 10.0, "ttft_target_s_per_token": 0.0, "ttft_target_batch_s": 60.0}


class Told:
    """What the engines of a system were given as priorities, in order."""

    def __init__(self, system: System) -> None:
        self.priorities: list[int] = []
        for engine in system.engines:
            engine.app = self._noting(engine)

    def _noting(self, engine: FakeEngine):
        answer = engine.app

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            self.priorities.append(current_accounting.get().priority)
            await answer(scope, receive, send)

        return app


@pytest.mark.parametrize(
    ("priority_class", "due_s"), [("interactive", 5.0), ("standard", 10.0), ("batch", 70.0)]
)
async def test_the_engines_priority_is_when_the_first_token_is_due(priority_class, due_s):
    """In milliseconds of the wall clock: several gateways' requests meet in one engine."""
    async with running(router=TARGETS) as system:
        told = Told(system)
        before_s = time.time()
        body = system.chat(priority_class=priority_class)
        assert (await system.client.post(CHAT, json=body)).status_code == 200
        [priority] = told.priorities
        assert (before_s + due_s) * 1000 - 1 <= priority <= (time.time() + due_s) * 1000 + 1


async def test_it_is_the_same_at_the_next_engine():
    """An attempt that failed has not bought the request any time."""
    async with running(router=TARGETS) as system:
        told = Told(system)
        for engine in system.engines:
            engine.status = 500
        await system.client.post(CHAT, json=system.chat())
        assert len(told.priorities) == 2
        assert abs(told.priorities[0] - told.priorities[1]) <= 2


async def test_without_an_order_of_its_own_the_gateway_asks_for_none():
    async with running(router={**TARGETS, "policy": "round_robin"}) as system:
        told = Told(system)
        await system.client.post(CHAT, json=system.chat())
        assert told.priorities == [0]


@pytest.mark.parametrize(
    ("fields", "headers", "shift_s"),
    [
        ({"priority": 3}, {}, 3.0),
        ({"priority": -7}, {}, -7.0),
        ({"priority": "4"}, {}, 4.0),
        ({"priority": 3}, {"x-vllm-priority": "-2"}, -2.0),  # vLLM, too, goes by the header first
        ({"priority": 3}, {"x-vllm-priority": "urgent"}, 3.0),
        ({"priority": 10**15}, {}, 60.0),  # as far as batch work
        ({"priority": -(2**63)}, {}, -60.0),
        ({}, {"x-vllm-priority": "-9223372036854775808"}, -60.0),
    ],
)
async def test_a_clients_own_priority_puts_its_request_off_or_forward(fields, headers, shift_s):
    """By a second each."""
    async with running(router=TARGETS) as system:
        told = Told(system)
        await system.client.post(CHAT, json=system.chat())
        await system.client.post(CHAT, json=system.chat(**fields), headers=headers)
        usual, shifted = told.priorities
        assert (shifted - usual) / 1000 == pytest.approx(shift_s, abs=0.5)


async def test_by_arrival_it_is_the_only_order_there_is():
    async with running(router={**TARGETS, "policy": "round_robin"}) as system:
        told = Told(system)
        for priority in (0, 3, -3):
            await system.client.post(CHAT, json=system.chat(priority=priority))
        assert told.priorities == [0, 3000, -3000]


async def test_no_tenant_comes_before_others_by_it(tmp_path):
    office = Office(tmp_path)
    headers = office.hire("acme")
    async with office.running(router=TARGETS) as system:
        told = Told(system)
        for priority in (0, -50, 5):
            body = system.chat(priority=priority)
            await system.client.post(CHAT, json=body, headers=headers)
        usual, forward, off = told.priorities
        assert 0 <= (forward - usual) / 1000 < 0.5
        assert (off - usual) / 1000 == pytest.approx(5.0, abs=0.5)


async def test_an_emulated_engine_goes_by_it(tmp_path):
    """The lowest is first, whoever came first; a client's own priority is in it already."""
    profile = Profile(
        name="one",
        model="one",
        device="none",
        source="made up",
        max_model_len=2000,
        max_num_seqs=1,
        max_num_batched_tokens=64,
        num_kv_tokens=4000,
        base_s=0.005,
        s_per_token=1e-6,
    )
    save_profile(profile, tmp_path / "one.yaml")
    engine = EmulatedEngine(EmulatedArgs(profile=str(tmp_path / "one.yaml")))
    ended: list[str] = []

    async def ask(name: str, priority: int, own_priority: int = 0) -> None:
        current_accounting.set(RequestAccounting(4, priority, request_id=name))
        body = {"prompt": f"{name} asks", "max_tokens": 8, "priority": own_priority}
        await Caller(engine.app, body, "/v1/completions").run()
        ended.append(name)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(ask("first", 50))
        await asyncio.sleep(0.01)
        tasks.create_task(ask("late", 90))
        tasks.create_task(ask("moved", 80, own_priority=-70))
        tasks.create_task(ask("soon", 60))
    assert ended == ["first", "soon", "moved", "late"]
