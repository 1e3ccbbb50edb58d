"""What becomes of a request whose engine did not carry it through?"""

import pytest

from router.resilience.breaker import BreakerState, Failure
from router.types import Dispatch, Fail, Hold, Outcome, Reject, RejectReason
from tests.router.core.short_ways import ends, occupy
from tests.support.builders import fail_attempt, info, make_router, req, snapshot


class TestFailedAttempt:
    def test_goes_elsewhere(self):
        router = make_router(2)
        [first] = router.on_arrival(req("a"), 0.0)
        [second] = fail_attempt(router, "a", Failure.ERROR, 0.1)
        assert {first.replica_id, second.replica_id} == {"r0", "r1"}
        assert second.booking == 1
        assert router.state(0.1).replicas[first.replica_id].ledger.num_open == 0

    def test_the_same_engine_again_where_there_is_no_other(self):
        router = make_router()
        router.on_arrival(req("a"), 0.0)
        assert fail_attempt(router, "a", Failure.ERROR, 0.1) == [Dispatch("a", "r0", 2)]

    def test_leaves_its_room_to_who_waits(self):
        """Here to one who is held with a sooner deadline, and for whom the engine is kept."""
        engine = {"max_num_batched_tokens": 2000, "num_kv_tokens": 1000}
        router = make_router(engine=engine, ttft_target_s_per_token=1.0)
        router.on_snapshot("r0", snapshot(num_free_kv_tokens=400), 0.0)
        router.on_arrival(req("long", 500), 0.0)
        assert router.on_arrival(req("short", 300, arrival_s=0.02), 0.02) == [Hold("short")]
        decisions = fail_attempt(router, "long", None, 0.2)
        assert decisions == [Hold("long"), Dispatch("short", "r0", 2)]

    def test_with_what_was_generated_as_part_of_its_prompt(self):
        router = make_router()
        router.on_arrival(req("a", 10), 0.0)
        fail_attempt(router, "a", None, 0.1, num_output_tokens=7)
        ledger = router.state(0.1).replicas["r0"].ledger
        assert ledger.num_prefill_tokens == 17

    def test_keeps_its_turn(self):
        router = make_router()
        occupy(router, "r0")
        router.on_arrival(req("b", arrival_s=49.0), 49.0)
        router.on_replica_down("r0", 50.0)
        assert fail_attempt(router, "full-r0", None, 50.0) == [Hold("full-r0")]
        decisions = router.on_replica_up("r1", info(), 51.0)
        assert decisions[0] == Dispatch("full-r0", "r1", 1)

    def test_is_held_anew_and_beyond_the_bounds(self):
        router = make_router(max_hold_s=10.0, max_held_requests=0, suspect_hold_s=0.0)
        router.on_arrival(req("a", deadline_s=5.0), 0.0)
        router.on_replica_down("r0", 60.0)
        assert fail_attempt(router, "a", None, 60.0) == [Hold("a")]
        assert router.on_tick(69.0) == []
        assert router.on_tick(70.0) == [Reject("a", RejectReason.EXPIRED)]
        assert ends(router) == {Outcome.EXPIRED: 1}

    def test_is_given_up_after_enough_engines(self):
        router = make_router(max_attempts=3)
        router.on_arrival(req("a"), 0.0)
        for _ in range(2):
            [again] = fail_attempt(router, "a", Failure.ERROR, 0.0)
            assert isinstance(again, Dispatch)
        assert fail_attempt(router, "a", Failure.ERROR, 0.0) == [Fail("a")]
        assert ends(router) == {Outcome.FAILED: 1}

    def test_is_not_blamed_while_its_reply_gets_on(self):
        router = make_router(max_attempts=2)
        router.on_arrival(req("a"), 0.0)
        for _ in range(5):
            [again] = fail_attempt(router, "a", None, 0.0, num_output_tokens=1)
            assert isinstance(again, Dispatch)
        assert fail_attempt(router, "a", None, 0.0, num_output_tokens=1) == [Fail("a")]

    def test_is_blamed_for_what_happens_at_the_same_token(self):
        router = make_router(max_attempts=3)
        router.on_arrival(req("a"), 0.0)
        for num_output_tokens in (7, 7, 0):
            [again] = fail_attempt(
                router, "a", Failure.ERROR, 0.0, num_output_tokens=num_output_tokens
            )
            assert isinstance(again, Dispatch)
        assert fail_attempt(router, "a", Failure.ERROR, 0.0) == [Fail("a")]

    def test_a_record_that_is_given_up_is_no_progress(self):
        router = make_router(max_attempts=2)
        router.on_arrival(req("a", num_tokens=20), 0.0)
        [again] = fail_attempt(router, "a", Failure.ERROR, 0.0, num_output_tokens=7)
        assert isinstance(again, Dispatch)
        assert fail_attempt(router, "a", Failure.ERROR, 0.0, num_output_tokens=-7) == [Fail("a")]

    def test_failures_of_single_requests_draw_on_the_budget_and_losses_do_not(self):
        router = make_router(retry={"max_balance": 1.0, "share": 0.0, "reserve_per_s": 0.0})
        for request_id in "abc":
            router.on_arrival(req(request_id), 0.0)
        assert fail_attempt(router, "a", Failure.ERROR, 0.0) == [Dispatch("a", "r0", 4)]
        assert fail_attempt(router, "b", Failure.ERROR, 0.0) == [Fail("b")]
        assert fail_attempt(router, "c", None, 0.0) == [Dispatch("c", "r0", 5)]
        assert router.state(0.0).retries.num_made == 2

    def test_failures_open_the_breaker_where_another_engine_fares_better(self):
        router = make_router(2, breaker={"max_consecutive_failures": 1, "cooldown_jitter": 0.0})
        [first] = router.on_arrival(req("a"), 0.0)
        [second] = fail_attempt(router, "a", Failure.ERROR, 0.0)
        router.on_finish("a", None, 0.0)
        [third] = router.on_arrival(req("b"), 0.5)
        assert third.replica_id == second.replica_id
        breaker = router.state(0.5).replicas[first.replica_id].breaker
        assert breaker.state is BreakerState.OPEN
        assert breaker.next_probe_in_s == pytest.approx(0.5)
        [event] = router.state(0.5).breaker_events
        assert (event.breaker, event.event) == (first.replica_id, "open")
