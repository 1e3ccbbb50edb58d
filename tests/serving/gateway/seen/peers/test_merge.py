"""States of gateways add up: counts, bookings at engines, and what is of one alone."""

import msgspec
import pytest

from router import Router
from router.core.settings import RouterSettings
from router.fleet.ledger import LedgerState
from router.resilience.breaker import BreakerState
from serving.gateway.observe.peers import merge as module
from serving.gateway.observe.peers.merge import merge
from serving.gateway.observe.state import GatewayState
from serving.gateway.tenants.tenants import Consumption
from tests.support.running_gateway import CHAT, running_together


@pytest.fixture
async def states() -> list[GatewayState]:
    """Of two gateways before two engines; the first had one request, the other two."""
    async with running_together() as systems:
        for number, system in enumerate(systems):
            for _ in range(number + 1):
                reply = await system.client.post(CHAT, json=system.chat(max_tokens=2))
                assert reply.status_code == 200
            await system.until(lambda s=system: not s.gateway.driver.exchanges)
        return [system.gateway.state() for system in systems]


def test_every_rule_is_for_a_field_that_there_is():
    for kind, name in module._RULES:
        assert name in kind.__struct_fields__
        assert module._owner(kind, name) is kind


async def test_what_is_counted_is_summed(states):
    together = merge(states)
    assert [each.outcomes["completed"] for each in states] == [1, 2]
    assert together.outcomes["completed"] == 3
    assert together.accuracy.ttft.num_compared == 2  # percentiles are of whoever compared most
    assert together.gateway_id == "g0"
    assert (together.policy, together.holds) == ("headway", True)
    assert together.retries.budget.balance == sum(each.retries.budget.balance for each in states)
    assert set(together.replicas) == {"r0", "r1"}
    assert merge(states[:1]) is states[0]


async def test_an_engine_has_its_freshest_snapshot_and_the_bookings_of_all(states):
    one, other = states[0].replicas["r0"], states[1].replicas["r0"]

    def booked(replica, num: int, age_s: float, pending: int, **fields):
        snapshot = msgspec.structs.replace(
            replica.snapshot, num_pending_prefill_tokens=pending, num_free_kv_tokens=1000
        )
        ledger = LedgerState(
            num_open=num,
            num_unacknowledged=num,
            num_prefill_tokens=10 * num,
            num_kv_tokens=20 * num,
        )
        return msgspec.structs.replace(
            replica,
            snapshot=snapshot,
            age_s=age_s,
            ledger=ledger,
            num_pending_prefill_tokens=pending + 10 * num,
            num_free_kv_tokens=1000 - pending - 20 * num,
            **fields,
        )

    opened = msgspec.structs.replace(other.breaker, state=BreakerState.OPEN)
    one = booked(one, 3, age_s=0.2, pending=50)
    other = booked(other, 1, age_s=0.1, pending=30, breaker=opened, is_mute=True)
    together = merge([one, other])
    assert together.snapshot == other.snapshot
    assert together.ledger.num_open == 4
    assert together.num_pending_prefill_tokens == 30 + 40
    assert together.num_free_kv_tokens == 1000 - 30 - 80
    assert together.breaker.state is BreakerState.OPEN
    assert together.is_mute
    assert not together.is_draining


async def test_one_that_knows_fewer_engines_takes_none_away(states):
    fewer = msgspec.structs.replace(states[1], replicas={}, drained=["r9"])
    together = merge([fewer, states[0]])
    assert set(together.replicas) == {"r0", "r1"}
    assert together.drained == ["r9"]


def test_usage_is_summed_by_tenant():
    one = {"acme": Consumption(1, 2, 3, 4, 5)}
    other = {"acme": Consumption(10, 20, 30, 40, 50), "ops": Consumption(num_refused=7)}
    merged = module.merge_by_key([one, other])
    assert merged == {"acme": Consumption(11, 22, 33, 44, 55), "ops": Consumption(num_refused=7)}


def test_every_field_of_a_fresh_state_merges_with_itself():
    """What no rule is right for would raise, or change a state without counts."""
    state = Router(RouterSettings()).state(0.0)
    together = merge([state, state])
    balance = state.retries.budget.balance
    retries = msgspec.structs.replace(
        state.retries, budget=msgspec.structs.replace(state.retries.budget, balance=2 * balance)
    )
    memory = msgspec.structs.replace(
        state.prefix_memory,
        max_blocks=2 * state.prefix_memory.max_blocks,
        max_bytes=2 * state.prefix_memory.max_bytes,
    )
    assert together == msgspec.structs.replace(state, retries=retries, prefix_memory=memory)
