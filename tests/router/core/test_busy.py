"""A request that an engine gives back as busy: placed again or held, never lost, no failure."""

from router.core.router import Router
from router.types import Decision, Dispatch, Hold, Outcome
from tests.router.core.short_ways import ends
from tests.support.builders import make_router, req, snapshot

PENDING = 5000  # tokens that others have sent


def give_back(router: Router, dispatch: Dispatch, now_s: float, seq: int) -> list[Decision]:
    """Report that an engine has not begun a request, as others have sent it more than it takes."""
    state = snapshot(
        seq,
        last_booking=dispatch.booking,
        num_running_reqs=1,
        num_pending_prefill_tokens=PENDING,
        num_step_demand_tokens=PENDING,
    )
    held = router.on_snapshot(dispatch.replica_id, state, now_s)
    again = router.failures.on_refused_as_busy(dispatch.request_id, dispatch.replica_id, now_s)
    return [*held, *again]


def test_goes_to_the_other_engine_and_is_counted_once():
    router = make_router(2)
    [first] = router.on_arrival(req("a"), 0.0)
    assert first.max_pending_tokens > 0
    [second] = give_back(router, first, 0.01, seq=1)
    assert isinstance(second, Dispatch)
    assert {first.replica_id, second.replica_id} == {"r0", "r1"}
    state = router.state(0.01)
    assert state.replicas[first.replica_id].ledger.num_open == 0
    assert state.replicas[second.replica_id].ledger.num_open == 1
    assert (state.retries.num_bounced, state.retries.num_made) == (1, 0)
    assert state.breaker_events == []
    router.on_finish("a", None, 1.0)
    assert ends(router) == {Outcome.COMPLETED: 1}
    assert router.state(1.0).num_placed == 0


def test_is_held_past_the_bounds_if_all_are_busy_and_keeps_its_turn():
    router = make_router(2, max_held_requests=1)
    [first] = router.on_arrival(req("a"), 0.0)
    [second] = give_back(router, first, 0.01, seq=1)
    # That engine had more than a step to do by then as well, and the queue is full.
    router.on_arrival(req("full", PENDING, arrival_s=0.02), 0.02)
    assert router.on_arrival(req("late", 50, arrival_s=0.03), 0.03)[-1] == Hold("late")
    assert give_back(router, second, 0.04, seq=1) == [Hold("a")]
    assert router.state(0.04).held.num_requests == 2
    decisions = router.on_snapshot(first.replica_id, snapshot(2, last_booking=1), 0.05)
    assert [each.request_id for each in decisions] == ["a", "late"]


def test_after_two_engines_the_next_one_takes_it():
    router = make_router(3)
    [dispatch] = router.on_arrival(req("a"), 0.0)
    seen = [dispatch.replica_id]
    for number in range(2):
        assert dispatch.max_pending_tokens > 0
        [dispatch] = give_back(router, dispatch, 0.01 * (number + 1), seq=1)
        seen.append(dispatch.replica_id)
    assert sorted(seen) == ["r0", "r1", "r2"]
    assert dispatch.max_pending_tokens == 0


def test_where_there_is_no_other_engine_it_has_to_be_taken():
    [dispatch] = make_router(1).on_arrival(req("a"), 0.0)
    assert dispatch.max_pending_tokens == 0


def test_one_whose_client_has_left_is_not_placed_again():
    router = make_router(2)
    [first] = router.on_arrival(req("a"), 0.0)
    router.on_cancel("a", 0.005)
    assert give_back(router, first, 0.01, seq=1) == []
    assert ends(router) == {Outcome.RENEGED: 1}
    assert router.state(0.01).retries.num_bounced == 0
