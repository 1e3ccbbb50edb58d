"""Whose fault is an error reply?"""

import itertools

import pytest

from router.resilience.breaker import BreakerState, Failure
from router.types import Dispatch, Fail, Outcome, Usage, Withdraw
from tests.router.core.short_ways import ends
from tests.support.builders import fail_attempt, make_router, req

ONE_OPENS = {"max_consecutive_failures": 1, "cooldown_jitter": 0.0}


def error_reply(router, dispatch, status=500, now_s=0.0, *, has_begun=False, can_retry=True):
    """An engine answers a request with an error."""
    return router.failures.on_error_reply(
        dispatch.request_id,
        dispatch.replica_id,
        now_s,
        status=status,
        can_retry=can_retry,
        has_begun=has_begun,
        num_output_tokens=0,
    )


def breaker_states(router, now_s=0.0):
    return {
        replica_id: replica.breaker.state
        for replica_id, replica in router.state(now_s).replicas.items()
    }


ALL_CLOSED = {"r0": BreakerState.CLOSED, "r1": BreakerState.CLOSED}


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_is_tried_once_more_elsewhere(status):
    router = make_router(2)
    [first] = router.on_arrival(req("a"), 0.0)
    withdraw, again = error_reply(router, first, status)
    assert withdraw == Withdraw("a", first.replica_id, first.booking)
    assert isinstance(again, Dispatch)
    assert again.replica_id != first.replica_id


def test_two_engines_that_say_the_same_are_believed_and_neither_is_blamed():
    """Any number of such requests: no breaker opens, or one client could stop the service."""
    router = make_router(2, breaker=ONE_OPENS)
    for number in range(20):
        [first] = router.on_arrival(req(f"bad{number}"), 0.0)
        _, again = error_reply(router, first)
        assert error_reply(router, again) == []  # the client is to have it
        router.on_answer(again.request_id, again.replica_id, 0.0)
        router.on_first_token(again.request_id, 0.0)
        router.on_finish(again.request_id, Usage(), 0.0)
        assert breaker_states(router) == ALL_CLOSED
        assert all(
            replica.breaker.num_open_calls == 0 for replica in router.state(0.0).replicas.values()
        )
    assert ends(router) == {Outcome.COMPLETED: 20}


def test_an_engine_is_blamed_once_another_one_answers():
    router = make_router(2, breaker=ONE_OPENS)
    [first] = router.on_arrival(req("a"), 0.0)
    _, again = error_reply(router, first)
    assert breaker_states(router) == ALL_CLOSED  # nobody knows yet
    router.on_answer("a", again.replica_id, 0.0)
    states = breaker_states(router)
    assert states[first.replica_id] is BreakerState.OPEN
    assert states[again.replica_id] is BreakerState.CLOSED
    router.on_finish("a", Usage(num_output_tokens=1), 0.0)
    assert [event.event for event in router.state(0.0).breaker_events] == ["open"]


def test_an_engine_that_fails_all_requests_is_left():
    router = make_router(2, breaker={"cooldown_jitter": 0.0})
    sick = "r0"
    for number in itertools.count():
        assert number < 30
        [dispatch] = router.on_arrival(req(f"q{number}"), 0.0)
        if dispatch.replica_id == sick:
            _, dispatch = error_reply(router, dispatch)
        router.on_answer(dispatch.request_id, dispatch.replica_id, 0.0)
        router.on_finish(dispatch.request_id, Usage(num_output_tokens=1), 0.0)
        if breaker_states(router)[sick] is BreakerState.OPEN:
            break
    assert breaker_states(router)["r1"] is BreakerState.CLOSED


def test_replies_that_break_off_are_judged_alike():
    router = make_router(2, breaker=ONE_OPENS, max_attempts=2)
    [first] = router.on_arrival(req("a"), 0.0)
    [again] = fail_attempt(router, "a", Failure.ERROR, 0.0)
    assert fail_attempt(router, "a", Failure.ERROR, 0.0) == [Fail("a")]
    assert first.replica_id != again.replica_id
    assert breaker_states(router) == ALL_CLOSED


def test_replies_that_break_off_later_and_later_are_nobodys_fault():
    """Each engine answers, and then breaks off as the one before did."""
    router = make_router(2, breaker=ONE_OPENS, max_attempts=4)
    [dispatch] = router.on_arrival(req("a"), 0.0)
    for _ in range(3):
        router.on_answer("a", dispatch.replica_id, 0.0)
        [dispatch] = fail_attempt(router, "a", Failure.ERROR, 0.0, has_begun=True)
        assert breaker_states(router) == ALL_CLOSED
    router.on_answer("a", dispatch.replica_id, 0.0)
    router.on_finish("a", Usage(num_output_tokens=1), 0.0)  # another engine carries it through
    assert BreakerState.OPEN in breaker_states(router).values()


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_a_clients_error_is_no_verdict_and_nothing_is_learned_of_it(status):
    """A half-open breaker stays so: that an engine refuses says nothing of whether it computes."""
    router = make_router(1, breaker=ONE_OPENS | {"cooldown_s": 1.0})
    router._fleet.get("r0").breaker.record_failure(
        router._fleet.get("r0").breaker.begin_call(0.0), Failure.ERROR, 0.0
    )
    router.on_tick(1.5)
    assert breaker_states(router, 1.5) == {"r0": BreakerState.HALF_OPEN}
    before = router.state(1.5).accuracy
    [probe] = router.on_arrival(req("a", arrival_s=1.5), 1.5)
    assert error_reply(router, probe, status, 1.5) == []
    router.on_answer("a", "r0", 1.5)
    router.on_first_token("a", 1.5)
    router.on_finish("a", Usage(num_prompt_tokens=10), 1.5)
    assert breaker_states(router, 1.5) == {"r0": BreakerState.HALF_OPEN}
    assert router.state(1.5).accuracy == before
    assert ends(router) == {Outcome.COMPLETED: 1}
    assert isinstance(router.on_arrival(req("b", arrival_s=1.5), 1.5)[0], Dispatch)  # a probe again


def test_a_reply_that_has_begun_does_not_end_as_another_engines_error():
    router = make_router(2)
    [first] = router.on_arrival(req("a"), 0.0)
    withdraw, again = error_reply(router, first, has_begun=True)
    assert isinstance(again, Dispatch)
    assert error_reply(router, again, has_begun=True) == [
        Withdraw("a", again.replica_id, again.booking),
        Fail("a"),
    ]
    assert withdraw.request_id == "a"


def test_a_hedged_request_is_left_to_its_other_engine():
    router = make_router(2, hedge_factor=2.0, breaker=ONE_OPENS)
    [first] = router.on_arrival(req("a"), 0.0)
    [hedge] = router.on_tick(50.0)
    assert error_reply(router, first, now_s=50.0) == [
        Withdraw("a", first.replica_id, first.booking)
    ]
    router.on_answer("a", hedge.replica_id, 50.0)
    assert breaker_states(router, 50.0)[first.replica_id] is BreakerState.OPEN


def test_an_unknown_attempt_changes_nothing():
    router = make_router()
    assert error_reply(router, Dispatch("x", "r0", 1)) == []
