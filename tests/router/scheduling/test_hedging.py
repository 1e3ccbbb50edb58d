"""A second engine for late first tokens: who gets one, and that nothing of it stays behind."""

from collections import defaultdict

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.core.carry_out import carry_out
from router.resilience.breaker import Failure
from router.types import Dispatch, Fail, Outcome, Usage, Withdraw
from tests.support.builders import info, make_router, req
from tests.support.shell import IdleShell

LATE_S = 100.0  # after any prediction here
USAGE = Usage(num_prompt_tokens=10, num_output_tokens=5)


def hedged(num_replicas: int = 2, **settings):
    """A router with one late request; the router and the decisions of its look."""
    router = make_router(num_replicas, hedge_factor=3.0, stale_s=1e9, **settings)
    [first] = router.on_arrival(req(), 0.0)
    assert isinstance(first, Dispatch)
    hedges = [each for each in router.on_tick(LATE_S) if isinstance(each, Dispatch)]
    return router, first, hedges


def num_booked(router) -> dict[str, int]:
    replicas = router.state(LATE_S).replicas
    return {name: replica.ledger.num_open for name, replica in replicas.items()}


def num_calls(router) -> int:
    replicas = router.state(LATE_S).replicas.values()
    return sum(replica.breaker.num_open_calls for replica in replicas)


def counts(router) -> tuple[int, int, int]:
    """Requests that two engines have, that were hedged, that the second engine answered."""
    hedges = router.state(LATE_S).hedges
    return hedges.num_open, hedges.num_made, hedges.num_won


def test_who_is_late_goes_to_a_second_engine_once():
    router, first, [hedge] = hedged()
    assert hedge.request_id == "a"
    assert {first.replica_id, hedge.replica_id} == {"r0", "r1"}
    assert num_booked(router) == {"r0": 1, "r1": 1}
    assert not router.on_tick(2 * LATE_S)
    assert counts(router) == (1, 1, 0)


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
    [first] = router.on_arrival(req(), 0.0)
    if answered == "streamed":
        router.on_first_token("a", 0.1)
    else:
        router.on_answer("a", first.replica_id, 0.1)
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
    hedges = [each for each in router.on_tick(LATE_S) if isinstance(each, Dispatch)]
    assert len(hedges) == 1
    assert sum(num_booked(router).values()) == 4
    assert num_calls(router) == 4


def test_the_first_answers_first():
    router, first, [hedge] = hedged()
    stop = Withdraw("a", hedge.replica_id, hedge.booking)
    assert router.on_answer("a", first.replica_id, LATE_S) == [stop]
    assert num_booked(router) == {"r0": 0, "r1": 0} | {first.replica_id: 1}
    router.on_first_token("a", LATE_S)
    router.on_finish("a", USAGE, LATE_S)
    assert num_booked(router) == {"r0": 0, "r1": 0}
    assert num_calls(router) == 0
    assert router.outcomes == {Outcome.COMPLETED: 1}
    assert counts(router) == (0, 1, 0)


def test_a_first_token_without_a_word_of_whose_it_is_is_the_first_ones():
    router, first, [hedge] = hedged()
    stop = Withdraw("a", hedge.replica_id, hedge.booking)
    assert router.on_first_token("a", LATE_S) == [stop]
    assert num_booked(router) == {"r0": 0, "r1": 0} | {first.replica_id: 1}


def test_the_second_answers_first():
    router, first, [hedge] = hedged()
    stop = Withdraw("a", first.replica_id, first.booking)
    assert router.on_answer("a", hedge.replica_id, LATE_S) == [stop]
    assert num_booked(router) == {"r0": 0, "r1": 0} | {hedge.replica_id: 1}
    router.on_first_token("a", LATE_S)
    router.on_finish("a", USAGE, LATE_S)
    assert num_booked(router) == {"r0": 0, "r1": 0}
    assert num_calls(router) == 0
    assert router.outcomes == {Outcome.COMPLETED: 1}
    assert counts(router) == (0, 1, 1)


def test_the_first_fails_and_the_second_goes_on():
    router, first, [hedge] = hedged()
    assert not router.failures.on_attempt_failed("a", first.replica_id, Failure.ERROR, LATE_S)
    assert num_booked(router) == {"r0": 0, "r1": 0} | {hedge.replica_id: 1}
    assert num_calls(router) == 1
    assert counts(router) == (0, 1, 1)
    # From here it is like any other: it may move on.
    [again] = router.failures.on_attempt_failed("a", hedge.replica_id, None, LATE_S)
    assert isinstance(again, Dispatch)
    assert again.replica_id == first.replica_id


def test_the_second_fails_and_the_first_goes_on():
    router, first, [hedge] = hedged()
    assert not router.failures.on_attempt_failed("a", hedge.replica_id, Failure.ERROR, LATE_S)
    assert num_booked(router) == {"r0": 0, "r1": 0} | {first.replica_id: 1}
    assert num_calls(router) == 1
    assert counts(router) == (0, 1, 0)


def test_the_client_leaves_both():
    router, _, _ = hedged()
    router.on_cancel("a", LATE_S)
    assert num_booked(router) == {"r0": 0, "r1": 0}
    assert num_calls(router) == 0
    assert router.outcomes == {Outcome.RENEGED: 1}


def test_words_of_an_attempt_that_is_over_change_nothing():
    router, first, [hedge] = hedged()
    router.on_answer("a", first.replica_id, LATE_S)
    before = num_booked(router)
    assert router.on_answer("a", hedge.replica_id, LATE_S) == []
    assert router.failures.on_attempt_failed("a", hedge.replica_id, Failure.ERROR, LATE_S) == []
    assert num_booked(router) == before


class Places(IdleShell):
    """A shell that knows from the decisions alone which engines have each request."""

    def __init__(self) -> None:
        self.places: dict[str, set[str]] = defaultdict(set)
        self.num_hedges = 0

    def dispatch(self, decision: Dispatch) -> None:
        places = self.places[decision.request_id]
        assert decision.replica_id not in places
        assert len(places) < 2
        self.num_hedges += bool(places)
        places.add(decision.replica_id)

    def withdraw(self, decision: Withdraw) -> None:
        self.places[decision.request_id].remove(decision.replica_id)

    def fail(self, decision: Fail) -> None:
        self.places[decision.request_id].clear()


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "arrive",
                "first_token",
                "answer",
                "failed",
                "lost",
                "cancel",
                "finish",
                "tick",
                "down",
                "up",
            ]
        ),
        st.integers(0, 3),  # which request
        st.integers(0, 2),  # which engine
        st.sampled_from([0.0, 0.3, 5.0]),  # seconds later
    ),
    max_size=40,
)


@settings(deadline=None)
@given(EVENTS)
def test_whatever_comes_in_whatever_order_nothing_stays_behind(events):
    """The shell and the router agree at all times on which engines have a request.

    Every request ends once; then no booking or call is left on any engine.
    """
    router = make_router(3, hedge_factor=2.0, stale_s=1e9, hang_s=1e9)
    shell = Places()
    now_s, num_arrived = 0.0, 0
    for event, number, engine, later_s in events:
        now_s += later_s
        request_id, replica_id = f"q{number}", f"r{engine}"
        match event:
            case "arrive":
                request_id = f"q{num_arrived}"
                num_arrived += 1
                decisions = router.on_arrival(req(request_id, arrival_s=now_s), now_s)
            case "first_token":
                decisions = router.on_first_token(request_id, now_s)
            case "answer":
                decisions = router.on_answer(request_id, replica_id, now_s)
            case "failed" | "lost":
                shell.places[request_id].discard(replica_id)
                failure = Failure.ERROR if event == "failed" else None
                decisions = router.failures.on_attempt_failed(
                    request_id, replica_id, failure, now_s
                )
            case "cancel":
                shell.places[request_id].clear()
                decisions = router.on_cancel(request_id, now_s)
            case "finish":
                decisions = router.on_finish(request_id, USAGE, now_s)
            case "tick":
                decisions = router.on_tick(now_s)
            case "down":
                decisions = router.on_replica_down(replica_id, now_s)
            case "up":
                decisions = router.on_replica_up(replica_id, info(), now_s)
        carry_out(decisions, shell)
        if event == "finish":
            shell.places[request_id].clear()
        for each, places in shell.places.items():
            assert {attempt.replica.id for attempt in router._attempts.of(each)} == places
    assert counts(router)[1] == shell.num_hedges
    for number in range(num_arrived):
        router.on_cancel(f"q{number}", now_s)
    assert counts(router)[0] == 0
    assert sum(router.outcomes.values()) == num_arrived
    for replica in router.state(now_s).replicas.values():
        ledger = msgspec.structs.asdict(replica.ledger)
        assert ledger == dict.fromkeys(ledger, 0)
        assert replica.breaker.num_open_calls == 0
