"""A second engine for late first tokens: who gets one, and that nothing of it stays behind."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.fleet.ledger import Ledger
from router.resilience.breaker import Failure
from router.scheduling.hedging import HedgingState
from router.types import Dispatch, Hedge, Usage
from tests.support.builders import info, make_router, req

LATE_S = 100.0  # after any prediction here
USAGE = Usage(num_prompt_tokens=10, num_output_tokens=5)


def hedged(num_replicas: int = 2, **settings):
    """A router with one late request; the router and the decisions of its look."""
    router = make_router(num_replicas, hedge_factor=3.0, stale_s=1e9, **settings)
    [first] = router.on_arrival(req(), 0.0)
    assert isinstance(first, Dispatch)
    hedges = [each for each in router.on_tick(LATE_S) if isinstance(each, Hedge)]
    return router, first, hedges


def num_booked(router) -> dict[str, int]:
    replicas = router.state(LATE_S).replicas
    return {name: replica.ledger.num_open for name, replica in replicas.items()}


def num_calls(router) -> int:
    replicas = router.state(LATE_S).replicas.values()
    return sum(replica.breaker.num_open_calls for replica in replicas)


def test_who_is_late_goes_to_a_second_engine_once():
    router, first, [hedge] = hedged()
    assert hedge.dispatch.request_id == "a"
    assert {first.replica_id, hedge.dispatch.replica_id} == {"r0", "r1"}
    assert num_booked(router) == {"r0": 1, "r1": 1}
    assert not router.on_tick(2 * LATE_S)
    assert router.state(0.0).hedges == HedgingState(num_open=1, num_made=1, num_won=0)


def test_by_default_nobody_does():
    router = make_router(2, stale_s=1e9)
    router.on_arrival(req(), 0.0)
    assert router.on_tick(LATE_S) == []


def test_who_is_in_time_does_not():
    router = make_router(2, hedge_factor=3.0, stale_s=1e9)
    router.on_arrival(req(), 0.0)
    assert router.on_tick(0.1) == []


@pytest.mark.parametrize("answered", ["streamed", "at once"])
def test_whose_answer_is_under_way_does_not(answered):
    router = make_router(2, hedge_factor=3.0, stale_s=1e9)
    router.on_arrival(req(), 0.0)
    if answered == "streamed":
        router.on_first_token("a", 0.1)
    else:
        router.on_progress("a")
    assert router.on_tick(LATE_S) == []


def test_without_another_engine_there_is_nowhere_to_go():
    router, _, hedges = hedged(1)
    assert not hedges
    assert num_booked(router) == {"r0": 1}


def test_the_retry_budget_pays():
    retry = {"share": 0.0, "reserve_per_s": 0.0, "max_balance": 1.0}
    router = make_router(2, hedge_factor=3.0, stale_s=1e9, retry=retry)
    for request_id in "abc":
        router.on_arrival(req(request_id), 0.0)
    hedges = [each for each in router.on_tick(LATE_S) if isinstance(each, Hedge)]
    assert len(hedges) == 1
    assert sum(num_booked(router).values()) == 4
    assert num_calls(router) == 4


def test_the_first_answers_first():
    router, first, _ = hedged()
    router.on_first_token("a", LATE_S)
    assert num_booked(router) == {"r0": 0, "r1": 0} | {first.replica_id: 1}
    router.on_finish("a", USAGE, LATE_S)
    assert num_booked(router) == {"r0": 0, "r1": 0}
    assert num_calls(router) == 0
    assert router.state(0.0).outcomes["completed"] == 1


def test_the_second_answers_first():
    router, _, [hedge] = hedged()
    router.on_hedge_won("a", None, LATE_S)
    assert num_booked(router) == {"r0": 0, "r1": 0} | {hedge.dispatch.replica_id: 1}
    router.on_first_token("a", LATE_S)
    router.on_finish("a", USAGE, LATE_S)
    assert num_booked(router) == {"r0": 0, "r1": 0}
    assert num_calls(router) == 0
    state = router.state(0.0)
    assert state.outcomes["completed"] == 1
    assert state.hedges == HedgingState(num_open=0, num_made=1, num_won=1)


def test_the_first_fails_and_the_second_goes_on():
    router, first, [hedge] = hedged()
    assert not router.on_hedge_won("a", Failure.ERROR, LATE_S)
    assert num_booked(router) == {"r0": 0, "r1": 0} | {hedge.dispatch.replica_id: 1}
    assert num_calls(router) == 1
    # From here it is like any other: it may move on.
    [again] = router.on_attempt_failed("a", None, LATE_S)
    assert isinstance(again, Dispatch)
    assert again.replica_id == first.replica_id


def test_the_second_fails_and_the_first_goes_on():
    router, first, _ = hedged()
    assert not router.on_hedge_failed("a", Failure.ERROR, LATE_S)
    assert num_booked(router) == {"r0": 0, "r1": 0} | {first.replica_id: 1}
    assert num_calls(router) == 1


def test_the_client_leaves_both():
    router, _, _ = hedged()
    router.on_cancel("a", LATE_S)
    assert num_booked(router) == {"r0": 0, "r1": 0}
    assert num_calls(router) == 0
    assert router.state(0.0).outcomes["reneged"] == 1


def test_words_of_a_hedge_that_is_over_change_nothing():
    router, _, _ = hedged()
    router.on_first_token("a", LATE_S)
    before = num_booked(router)
    assert router.on_hedge_won("a", None, LATE_S) == []
    assert router.on_hedge_failed("a", Failure.ERROR, LATE_S) == []
    assert num_booked(router) == before


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "arrive",
                "first_token",
                "progress",
                "won",
                "failed",
                "attempt_failed",
                "cancel",
                "finish",
                "tick",
                "down",
                "up",
            ]
        ),
        st.integers(0, 3),  # which request, and which engine
        st.sampled_from([0.0, 0.3, 5.0]),  # seconds later
    ),
    max_size=40,
)


@settings(deadline=None)
@given(EVENTS)
def test_whatever_comes_in_whatever_order_nothing_stays_behind(events):
    """Every request ends once; then no booking, call or second is left on any engine."""
    router = make_router(3, hedge_factor=2.0, stale_s=1e9, hang_s=1e9)
    now_s, num_arrived, num_hedges = 0.0, 0, 0
    decisions: list = []
    for event, number, later_s in events:
        now_s += later_s
        request_id, replica_id = f"q{number}", f"r{number % 3}"
        match event:
            case "arrive":
                request_id = f"q{num_arrived}"
                num_arrived += 1
                decisions = router.on_arrival(req(request_id, arrival_s=now_s), now_s)
            case "first_token":
                decisions = router.on_first_token(request_id, now_s)
            case "progress":
                router.on_progress(request_id)
                decisions = []  # it asks for none
            case "won":
                decisions = router.on_hedge_won(request_id, None, now_s)
            case "failed":
                decisions = router.on_hedge_failed(request_id, Failure.ERROR, now_s)
            case "attempt_failed":
                decisions = router.on_attempt_failed(request_id, None, now_s)
            case "cancel":
                decisions = router.on_cancel(request_id, now_s)
            case "finish":
                decisions = router.on_finish(request_id, USAGE, now_s)
            case "tick":
                decisions = router.on_tick(now_s)
            case "down":
                decisions = router.on_replica_down(replica_id, now_s)
            case "up":
                decisions = router.on_replica_up(replica_id, info(), now_s)
        for decision in decisions:
            if isinstance(decision, Hedge):
                num_hedges += 1
                assert router.state(now_s).replicas[decision.dispatch.replica_id]
    assert router.state(now_s).hedges.num_made == num_hedges
    for number in range(num_arrived):
        router.on_cancel(f"q{number}", now_s)
    state = router.state(now_s)
    assert state.hedges.num_open == 0
    assert sum(state.outcomes.values()) == num_arrived
    for replica in state.replicas.values():
        assert replica.ledger == Ledger().state()
        assert replica.breaker.num_open_calls == 0
