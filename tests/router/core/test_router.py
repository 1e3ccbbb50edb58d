import random

import pytest

from router.core.router import Router
from router.resilience.breaker import BreakerState, Failure, TripReason
from router.settings import RouterSettings
from router.types import (
    Decision,
    Dispatch,
    Evacuate,
    Fail,
    Hold,
    Outcome,
    Reject,
    RejectReason,
    Usage,
)
from tests.support.builders import (
    after_json,
    busy,
    fail_attempt,
    info,
    make_router,
    req,
    snapshot,
    stepped,
)

FULL = 5000  # tokens: an engine with a prompt of this size to prefill takes no more


def ends(router: Router) -> dict[Outcome, int]:
    return {outcome: count for outcome, count in router.outcomes.items() if count}


def given_up(router: Router, request_id: str) -> list[Decision]:
    """What follows when a request fails that cannot be retried."""
    fail, *decisions = fail_attempt(router, request_id, None, 1.0, can_retry=False) or [None]
    assert fail in (Fail(request_id), None)
    return decisions


def occupy(router: Router, *replica_ids: str) -> None:
    """Fill the windows of these replicas, each by one request that names it."""
    for replica_id in replica_ids:
        [dispatch] = router.on_arrival(req(f"full-{replica_id}", FULL), now_s=0.0)
        assert isinstance(dispatch, Dispatch)


class TestArrival:
    def test_goes_to_an_idle_engine_at_once(self):
        router = make_router()
        assert router.on_arrival(req("a"), 0.0) == [Dispatch("a", "r0", 1)]

    def test_held_until_an_engine_has_room(self):
        """A request that fits nowhere leaves on the finish that makes room."""
        router = make_router()
        assert router.on_arrival(req("a", FULL), 0.0) == [Dispatch("a", "r0", 1)]
        assert router.on_arrival(req("b"), 1.0) == [Hold("b")]
        assert router.on_finish("a", Usage(), 2.0) == [Dispatch("b", "r0", 2)]

    def test_two_requests_do_not_see_the_same_idle_engine(self):
        router = make_router(2)
        occupy(router, "r0", "r1")
        placed = {replica.ledger.num_open for replica in router.state(0.0).replicas.values()}
        assert placed == {1}

    def test_an_open_id_is_not_taken_twice(self):
        router = make_router()
        router.on_arrival(req("a", FULL), 0.0)
        router.on_arrival(req("b"), 0.0)
        assert router.on_arrival(req("a"), 0.0) == []
        assert router.on_arrival(req("b"), 0.0) == []
        assert ends(router) == {}

    def test_unknown_model(self):
        router = make_router()
        decisions = router.on_arrival(req("a", model="gpt-4"), 0.0)
        assert decisions == [Reject("a", RejectReason.UNKNOWN_MODEL)]
        assert ends(router) == {Outcome.REJECTED: 1}

    def test_aliases_are_served(self):
        router = make_router(engine={"aliases": ("lora",)})
        assert router.on_arrival(req("a", model="lora"), 0.0) == [Dispatch("a", "r0", 1)]

    def test_without_any_engine_it_waits_for_one(self):
        router = Router(RouterSettings())
        assert router.on_arrival(req("a"), 0.0) == [Hold("a")]
        assert router.on_replica_up("r0", info(), 80.0) == [Dispatch("a", "r0", 1)]

    def test_a_model_whose_last_engine_was_lost_is_waited_for(self):
        router = make_router()
        router.on_replica_up("other", info(model="n"), 0.0)
        router.on_replica_down("r0", 1.0)
        assert router.on_arrival(req("a"), 2.0) == [Hold("a")]

    def test_a_prompt_too_large_for_any_engine_is_vllms_to_refuse(self):
        router = make_router()
        assert router.on_arrival(req("a", 10**6), 0.0) == [Dispatch("a", "r0", 1)]

    def test_queue_full_says_when_to_come_back(self):
        router = make_router(max_held_requests=1)
        occupy(router, "r0")
        router.on_arrival(req("b", 1000), 0.0)
        [reject] = router.on_arrival(req("c"), 0.0)
        assert reject.reason is RejectReason.QUEUE_FULL
        rate = router.state(0.0).replicas["r0"].prefill_tokens_per_s
        assert reject.retry_after_s == pytest.approx((FULL + 1000) / rate)
        assert ends(router) == {Outcome.REJECTED: 1}

    def test_nothing_is_held_where_nothing_may_be(self):
        router = make_router(max_held_requests=0)
        assert router.on_arrival(req("a", FULL), 0.0) == [Dispatch("a", "r0", 1)]
        [reject] = router.on_arrival(req("b"), 0.0)
        assert reject.reason is RejectReason.QUEUE_FULL


class TestEnds:
    @pytest.mark.parametrize(
        ("end", "outcome"),
        [
            (lambda router: router.on_finish("a", Usage(), 1.0), Outcome.COMPLETED),
            (lambda router: given_up(router, "a"), Outcome.FAILED),
            (lambda router: router.on_cancel("a", 1.0), Outcome.RENEGED),
        ],
    )
    def test_each_end_frees_the_booking_once(self, end, outcome):
        router = make_router()
        router.on_arrival(req("a", FULL), 0.0)
        router.on_arrival(req("b"), 0.0)
        assert end(router) == [Dispatch("b", "r0", 2)]
        assert end(router) == []  # told twice
        assert ends(router) == {outcome: 1}
        assert router.state(1.0).replicas["r0"].ledger.num_open == 1

    def test_a_client_that_leaves_the_queue(self):
        router = make_router()
        occupy(router, "r0")
        router.on_arrival(req("b"), 0.0)
        assert router.on_cancel("b", 1.0) == []
        assert router.on_finish("full-r0", None, 2.0) == []
        assert ends(router) == {Outcome.RENEGED: 1, Outcome.COMPLETED: 1}

    def test_events_about_unknown_requests_change_nothing(self):
        router = make_router()
        assert router.on_finish("x", None, 0.0) == []
        assert router.on_cancel("x", 0.0) == []
        assert router.on_attempt_failed("x", "r0", None, 0.0) == []
        assert router.on_first_token("x", 0.0) == []
        assert ends(router) == {}

    def test_a_held_request_can_neither_finish_nor_fail(self):
        router = make_router()
        occupy(router, "r0")
        router.on_arrival(req("b"), 0.0)
        assert router.on_finish("b", None, 0.0) == given_up(router, "b") == []
        assert router.state(0.0).held.num_requests == 1

    def test_expires_when_it_said_it_would(self):
        router = make_router(max_hold_s=60.0)
        occupy(router, "r0")
        router.on_arrival(req("b", deadline_s=5.0), 0.0)
        router.on_arrival(req("c"), 0.0)
        assert router.next_wake_s() <= 5.0
        assert router.on_tick(4.9) == []
        assert router.on_tick(5.0) == [Reject("b", RejectReason.EXPIRED)]
        assert router.next_wake_s() <= 60.0
        # Room that comes too late does not count.
        assert router.on_finish("full-r0", None, 61.0) == [Reject("c", RejectReason.EXPIRED)]
        assert router.next_wake_s() is None
        assert ends(router) == {Outcome.EXPIRED: 2, Outcome.COMPLETED: 1}


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
        """Here to one who is held with a sooner promise, and for whom the engine is kept."""
        engine = {"max_num_batched_tokens": 2000, "num_kv_tokens": 1000}
        router = make_router(engine=engine, ttft_target_s_per_token=1.0)
        router.on_snapshot("r0", snapshot(num_free_kv_tokens=400), 0.0)
        router.on_arrival(req("long", 500), 0.0)
        assert router.on_arrival(req("short", 300, arrival_s=0.1), 0.1) == [Hold("short")]
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
        router = make_router(max_hold_s=10.0, max_held_requests=0)
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
            [again] = fail_attempt(router, "a", None, 0.0)
            assert isinstance(again, Dispatch)
        assert fail_attempt(router, "a", None, 0.0) == [Fail("a")]
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
            [again] = fail_attempt(router, "a", None, 0.0, num_output_tokens=num_output_tokens)
            assert isinstance(again, Dispatch)
        assert fail_attempt(router, "a", None, 0.0) == [Fail("a")]

    def test_a_record_that_is_given_up_is_no_progress(self):
        router = make_router(max_attempts=2)
        router.on_arrival(req("a", num_tokens=20), 0.0)
        [again] = fail_attempt(router, "a", None, 0.0, num_output_tokens=7)
        assert isinstance(again, Dispatch)
        assert fail_attempt(router, "a", None, 0.0, num_output_tokens=-7) == [Fail("a")]

    def test_failures_of_single_requests_draw_on_the_budget_and_losses_do_not(self):
        router = make_router(retry={"max_balance": 1.0, "share": 0.0, "reserve_per_s": 0.0})
        for request_id in "abc":
            router.on_arrival(req(request_id), 0.0)
        assert fail_attempt(router, "a", Failure.ERROR, 0.0) == [Dispatch("a", "r0", 4)]
        assert fail_attempt(router, "b", Failure.ERROR, 0.0) == [Fail("b")]
        assert fail_attempt(router, "c", None, 0.0) == [Dispatch("c", "r0", 5)]
        assert router.state(0.0).retries.num_made == 2

    def test_failures_open_the_breaker(self):
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


ALIVE = {"heartbeat_s": 0.5}


class TestHealth:
    def test_a_silent_engine_is_left_for_another(self):
        router = make_router(2, engine=ALIVE, stale_s=3.0)
        [first] = router.on_arrival(req("a"), 0.0)
        other = {"r0": "r1", "r1": "r0"}[first.replica_id]
        for second in (1, 2, 3):
            router.on_snapshot(other, snapshot(second), float(second))
            assert router.on_tick(float(second)) == []
        assert router.on_tick(3.5) == [Evacuate(first.replica_id, "stale")]
        assert fail_attempt(router, "a", None, 3.5) == [Dispatch("a", other, 1)]
        assert router.on_tick(4.0) == []

    def test_an_engine_that_fell_silent_while_nobody_looked_gets_nothing(self):
        router = make_router(2, engine=ALIVE)
        router.on_snapshot("r1", snapshot(), 99.0)
        assert router.on_arrival(req("a"), 100.0) == [Dispatch("a", "r1", 1)]

    def test_a_hung_engine_is_left_and_an_idle_one_is_not(self):
        router = make_router(2)
        [first] = router.on_arrival(req("a"), 0.0)
        hung = first.replica_id
        report = {"last_booking": 1, "num_inflight_reqs": 1, "num_steps_total": 7}
        for seq in range(1, 5):
            router.on_snapshot(hung, busy(seq, **report), float(seq))
            assert router.on_tick(float(seq)) == []
        [evacuate] = router.on_tick(5.1)
        assert evacuate == Evacuate(hung, "hung")

    @pytest.mark.parametrize("step_s", [0.01, 0.1, 0.25, 0.5, 1.1])
    def test_a_hang_is_seen_within_five_seconds_whatever_the_step(self, step_s):
        """And a step of three times its prediction is none."""
        router, now_s = make_router(2), 0.0
        [first] = router.on_arrival(req("a"), now_s)
        hung = first.replica_id
        report = {"last_booking": 1, "num_inflight_reqs": 1, "num_decoding_reqs": 1}
        step = {"step_s": step_s, "step_num_decode_reqs": 1, "num_pending_prefill_tokens": 0}
        for number in range(1, 60):
            now_s += 3.0 * step_s if number == 50 else step_s
            router.on_tick(now_s)
            router.on_snapshot(hung, busy(number, **report, **step, num_steps_total=number), now_s)
        assert router.state(now_s).breaker_events == []
        hung_s, seq, decisions = now_s, 60, []
        while not decisions:
            now_s += 0.25
            seq += 1
            router.on_snapshot(hung, busy(seq, **report, **step, num_steps_total=59), now_s)
            decisions = router.on_tick(now_s)
        assert decisions == [Evacuate(hung, "hung")]
        assert 3.0 < now_s - hung_s <= 5.0

    def test_the_last_engine_is_not_left(self):
        router = make_router(engine=ALIVE)
        router.on_arrival(req("a"), 0.0)
        assert router.on_tick(60.0) == []
        assert router.on_arrival(req("b"), 60.0) == [Hold("b")]

    def test_a_connection_made_again_waits_for_the_cooldown_and_one_probe(self):
        router = make_router(breaker={"cooldown_jitter": 0.0, "cooldown_s": 1.0})
        router.on_replica_down("r0", 10.0)
        assert router.on_replica_up("r0", info(), 10.1) == []
        for request_id in "ab":
            assert router.on_arrival(req(request_id), 10.2) == [Hold(request_id)]
        assert router.on_tick(10.9) == []
        assert router.on_tick(11.2) == [Dispatch("a", "r0", 1)]
        assert router.on_tick(12.0) == []
        assert router.on_finish("a", None, 12.0) == [Dispatch("b", "r0", 2)]
        events = [event.event for event in router.state(12.0).breaker_events]
        assert events == ["open", "half_open", "probe", "closed"]

    def test_an_engine_that_left_in_peace_opened_nothing(self):
        router = make_router()
        router.on_replica_draining("r0", 1.0)
        router.on_replica_down("r0", 2.0)
        assert router.state(2.0).breaker_events == []

    def test_a_newcomer_among_old_ones_starts_slowly(self):
        router = make_router(2, breaker={"slow_start_s": 10.0})
        router.on_replica_up("r2", info(), 30.0)
        shares = {
            replica_id: replica.breaker.share
            for replica_id, replica in router.state(30.0).replicas.items()
        }
        assert shares == {"r0": 1.0, "r1": 1.0, "r2": 0.1}
        placed = [router.on_arrival(req(str(n), 1), 30.0)[0].replica_id for n in range(12)]
        assert placed.count("r2") == 1

    def test_a_newcomer_whose_fellows_are_out_starts_at_once(self):
        router = make_router(2, engine=ALIVE, breaker={"slow_start_s": 10.0})
        router.on_tick(60.0)
        router.on_replica_up("r2", info(), 60.0)
        replicas = router.state(60.0).replicas
        assert [replicas[name].breaker.state for name in ("r0", "r1")] == [BreakerState.OPEN] * 2
        assert replicas["r2"].breaker.share == 1.0

    def test_who_waits_is_the_probe_before_who_comes(self):
        """Also when the arrival is what makes the router look at its engines."""
        router = make_router(breaker={"cooldown_jitter": 0.0, "cooldown_s": 1.0})
        router.on_replica_down("r0", 0.0)
        router.on_replica_up("r0", info(), 0.0)
        assert router.on_arrival(req("a"), 0.5) == [Hold("a")]
        assert router.on_arrival(req("b"), 1.5) == [Dispatch("a", "r0", 1), Hold("b")]

    def test_a_slow_first_token_fails_the_probe(self):
        router = make_router(2, breaker={"cooldown_jitter": 0.0, "slow_floor_s": 2.0})
        router.on_replica_down("r0", 0.0)
        router.on_replica_up("r0", info(), 0.0)
        occupy(router, "r1")
        assert router.on_arrival(req("probe"), 0.5) == [Hold("probe")]
        assert router.on_tick(1.5) == [Dispatch("probe", "r0", 1)]
        router.on_first_token("probe", 4.0)
        breaker = router.state(4.0).replicas["r0"].breaker
        assert (breaker.state, breaker.reason) == (BreakerState.OPEN, TripReason.PROBE_SLOW)

    def test_slowness_of_all_is_load_and_no_reason_to_have_fewer(self):
        router = make_router(2, policy="round_robin", breaker={"min_calls": 1, "slow_floor_s": 1.0})
        for number in range(8):
            router.on_arrival(req(str(number)), 0.0)
        for number in range(8):
            router.on_first_token(str(number), 60.0)
        states = {replica.breaker.state for replica in router.state(60.0).replicas.values()}
        assert states == {BreakerState.OPEN, BreakerState.CLOSED}


class TestReplicas:
    def test_a_snapshot_opens_the_window(self):
        router = make_router()
        occupy(router, "r0")
        router.on_arrival(req("b"), 0.0)
        full = busy(1, last_booking=1, num_pending_prefill_tokens=4900)
        assert router.on_snapshot("r0", full, 1.0) == []
        done = busy(2, last_booking=1, num_pending_prefill_tokens=50)
        assert router.on_snapshot("r0", done, 2.0) == [Dispatch("b", "r0", 2)]
        assert router.on_snapshot("r0", done, 3.0) == []
        assert router.on_snapshot("nobody", done, 3.0) == []

    def test_the_window_stays_full_while_there_is_work(self):
        router = make_router()
        occupy(router, "r0")
        for number in range(10):
            router.on_arrival(req(f"b{number}", 30), 0.0)
        sent = router.on_snapshot("r0", busy(last_booking=1), 1.0)
        tokens = router.state(1.0).replicas["r0"].num_pending_prefill_tokens
        assert tokens == 30 * len(sent) >= 100  # at least a whole step, and no pile
        assert len(sent) < 10

    def test_a_draining_engine_finishes_and_takes_nothing(self):
        router = make_router()
        router.on_arrival(req("a"), 0.0)
        assert router.on_replica_draining("r0", 1.0) == []
        assert router.on_arrival(req("b"), 1.0) == [Hold("b")]
        assert router.on_finish("a", None, 2.0) == []
        assert router.on_snapshot("r0", snapshot(), 3.0) == []

    def test_a_lost_engines_requests_wait_for_the_shells_word(self):
        router = make_router(2)
        placed = {"r0": [], "r1": []}
        for request_id in "abcd":
            [dispatch] = router.on_arrival(req(request_id, 80), 0.0)
            placed[dispatch.replica_id].append(request_id)
        assert router.on_replica_down("r0", 1.0) == []
        assert "r0" not in router.state(1.0).replicas
        failed, retried = placed["r0"]
        assert given_up(router, failed) == []
        assert fail_attempt(router, retried, None, 1.0) == [Hold(retried)]  # r1 is full
        assert ends(router) == {Outcome.FAILED: 1}
        [again] = router.on_snapshot("r1", busy(last_booking=2), 2.0)
        assert again == Dispatch(retried, "r1", 3)

    def test_a_new_connection_begins_a_new_ledger(self):
        router = make_router()
        router.on_arrival(req("a"), 0.0)
        router.on_replica_up("r0", info(), 1.0)
        assert router.on_arrival(req("b"), 5.0) == [Dispatch("b", "r0", 1)]
        router.on_finish("a", None, 2.0)  # of the old connection
        assert router.state(2.0).replicas["r0"].ledger.num_open == 1


class TestPolicies:
    @pytest.mark.parametrize("name", ["round_robin", "least_requests", "power_of_two"])
    def test_baselines_send_at_once_whatever_the_load(self, name):
        router = make_router(2, policy=name)
        for number in range(50):
            [decision] = router.on_arrival(req(str(number), FULL), 0.0)
            assert isinstance(decision, Dispatch)

    def test_holding_is_settable_for_any_policy(self):
        assert make_router(policy="round_robin", hold=True).state(0.0).holds
        assert not make_router(policy="headway", hold=False).state(0.0).holds

    def test_a_policy_that_does_not_hold_lets_all_go(self):
        router = make_router()
        occupy(router, "r0")
        router.on_arrival(req("b"), 0.0)
        assert router.set_policy("round_robin", 1.0) == [Dispatch("b", "r0", 2)]
        assert router.state(1.0).policy == "round_robin"

    def test_an_unknown_policy_is_refused_and_changes_nothing(self):
        router = make_router()
        with pytest.raises(ValueError, match=r"'best'.*round_robin"):
            router.set_policy("best", 0.0)
        assert router.state(0.0).policy == "headway"

    def test_without_the_hold_all_go_at_once(self):
        router = make_router(ablate=["hold"])
        for number in range(50):
            [decision] = router.on_arrival(req(str(number), FULL), 0.0)
            assert isinstance(decision, Dispatch)

    @pytest.mark.parametrize(
        ("ablate", "first"), [((), "question"), (("order",), "document")], ids=["with", "without"]
    )
    def test_without_the_order_first_come_is_first_served(self, ablate, first):
        router = make_router(ablate=ablate)
        occupy(router, "r0")
        router.on_arrival(req("document", 4000, arrival_s=0.0), 0.0)
        router.on_arrival(req("question", 10, arrival_s=0.1), 0.1)
        freed = router.on_snapshot("r0", busy(last_booking=1), 1.0)
        assert freed[0].request_id == first

    def test_engines_that_have_run_nothing_are_used_beside_fast_ones(self):
        """What the one engine that has worked has learned holds for its like."""
        router = make_router(8)
        for number in range(1, 33):
            router.on_snapshot("r0", stepped(number, 0.002, prefill=100, decodes=1), 0.01 * number)
        for number in range(16):
            router.on_arrival(req(str(number), 100), 1.0)
        used = {name for name, each in router.state(1.0).replicas.items() if each.ledger.num_open}
        assert len(used) == 8

    def test_without_congestion_cost_those_who_decode_do_not_count(self):
        def chosen(**settings) -> str:
            router = make_router(2, **settings)
            router.on_snapshot("r0", snapshot(prefill_tokens_per_s=400.0), 0.0)
            crowded = busy(num_running_reqs=7, num_decoding_reqs=7, prefill_tokens_per_s=450.0)
            router.on_snapshot("r1", crowded, 0.0)
            [dispatch] = router.on_arrival(req("a", 50), 9.0)
            return dispatch.replica_id

        assert chosen() == "r0"
        assert chosen(ablate=["congestion_cost"]) == "r1"

    def test_parts_can_be_switched_while_requests_are_held(self):
        router = make_router()
        occupy(router, "r0")
        router.on_arrival(req("document", 4000, arrival_s=0.0), 0.0)
        router.on_arrival(req("question", 10, arrival_s=0.1), 0.1)
        assert router.set_policy("headway", 0.2, ["order"]) == []
        assert router.state(0.2).ablate == ["order"]
        both = router.set_policy("headway", 0.3, ["order", "hold"])
        assert both == [Dispatch("document", "r0", 2), Dispatch("question", "r0", 3)]
        router.set_policy("headway", 0.4)
        assert router.state(0.4).ablate == []
        assert router.state(0.4).holds

    def test_an_unknown_part_is_refused_and_changes_nothing(self):
        router = make_router(ablate=["order"])
        with pytest.raises(ValueError, match=r"'magic'.*congestion_cost"):
            router.set_policy("round_robin", 0.0, ["magic"])
        state = router.state(0.0)
        assert (state.policy, state.ablate) == ("headway", ["order"])
        with pytest.raises(ValueError, match="ablate"):
            make_router(ablate=["magic"])

    def test_says_whether_prefix_hashes_are_wanted(self):
        router = make_router()
        assert router.discipline.wants_prefix
        router.set_policy("headway", 0.0, ["prefix"])
        assert not router.discipline.wants_prefix
        router.set_policy("cache_aware", 0.0)
        assert router.discipline.wants_prefix

    def test_latencies_reach_the_policy(self):
        """By first token, or by the end where the response comes in one piece."""
        router = make_router(2, policy="least_response_time")
        router.on_arrival(req("a"), 0.0)
        router.on_first_token("a", 5.0)
        router.on_finish("a", None, 5.0)
        [other] = router.on_arrival(req("b"), 5.0)
        assert other.replica_id == "r1"
        router.on_finish("b", None, 15.0)
        [back] = router.on_arrival(req("c"), 15.0)
        assert back.replica_id == "r0"

    def test_an_injected_generator_decides(self):
        def run(rng: random.Random) -> list[str]:
            router = Router(RouterSettings(policy="power_of_two"), rng)
            for index in range(4):
                router.on_replica_up(f"r{index}", info(), 0.0)
            return [router.on_arrival(req(str(n)), 0.0)[0].replica_id for n in range(20)]

        assert run(random.Random(1)) == run(random.Random(1)) != run(random.Random(2))


class TestState:
    def test_is_json(self):
        router = Router(RouterSettings())
        after_json(router.state(0.0))
        router.on_replica_up("r0", info(), 0.0)
        router.on_arrival(req("a", FULL), 0.0)
        router.on_arrival(req("b"), 0.0)
        router.on_first_token("a", 1.0)
        router.on_snapshot("r0", stepped(1, 0.1, prefill=100), 1.0)
        state = after_json(router.state(3.0))
        assert state.replicas["r0"].age_s == 2.0
        assert state.accuracy.ttft.num_compared == 1

    def test_predictions_are_compared_with_what_came(self):
        router = make_router()
        router.on_arrival(req("a", 100), 0.0)
        predicted_s = 0.02 + 100 * 2.5e-4  # the cold guess: one step of 100 tokens
        router.on_first_token("a", predicted_s)
        router.on_first_token("a", 99.0)  # the first counts
        accuracy = router.state(1.0).accuracy.ttft
        assert accuracy.num_compared == 1
        assert accuracy.predicted_over_actual_p50 == pytest.approx(1.0)


def test_prediction_accuracy_is_that_of_the_present_policy():
    router = make_router()
    router.on_arrival(req("a"), 0.0)
    router.on_first_token("a", 1.0)
    assert router.state(1.0).accuracy.ttft.num_compared == 1
    router.set_policy("round_robin", 1.0)
    assert router.state(1.0).accuracy.ttft.num_compared == 0


class TestHopeless:
    def test_what_would_expire_before_its_turn_is_refused_at_once(self):
        router = make_router()
        occupy(router, "r0")
        rate = router.state(0.0).replicas["r0"].prefill_tokens_per_s
        drain_s = FULL / rate
        [reject] = router.on_arrival(req("b", deadline_s=drain_s / 2), 0.0)
        assert reject.reason is RejectReason.HOPELESS
        assert reject.retry_after_s == pytest.approx(drain_s / 2)
        assert router.on_arrival(req("c", deadline_s=drain_s * 1.01), 0.0) == [Hold("c")]
        assert ends(router) == {Outcome.REJECTED: 1}

    def test_what_comes_after_it_does_not_count(self):
        router = make_router()
        occupy(router, "r0")
        assert router.on_arrival(req("document", 50_000), 0.0) == [Hold("document")]
        assert router.on_arrival(req("question", deadline_s=10.0), 0.0) == [Hold("question")]

    def test_without_an_engine_nothing_is_known_to_be_hopeless(self):
        router = Router(RouterSettings())
        assert router.on_arrival(req("a", 10**6, deadline_s=0.1), 0.0) == [Hold("a")]


def compare(router: Router, name: str, actual_over_predicted: float) -> None:
    """Have 50 predictions of the first token compared with what came."""
    for number in range(50):
        request_id = f"{name}{number}"
        router.on_arrival(req(request_id, 100), 0.0)
        predicted_s = router._attempts.oldest(request_id).predicted_ttft_s
        router.on_first_token(request_id, predicted_s * actual_over_predicted)
        router.on_finish(request_id, None, 1.0)


def test_bad_predictions_give_way_to_the_order_of_arrival():
    router = make_router()
    compare(router, "bad", 0.25)  # predicted four times too long
    assert router.state(1.0).is_by_arrival
    occupy(router, "r0")
    router.on_arrival(req("document", 4000, arrival_s=0.0), 0.0)
    router.on_arrival(req("question", 10, arrival_s=0.1), 0.1)
    freed = router.on_finish("full-r0", None, 1.0)
    assert freed[0].request_id == "document"
    for request_id in ("document", "question"):
        router.on_cancel(request_id, 1.0)
    for repeat in range(3):
        compare(router, f"good{repeat}-", 1.0)
    assert not router.state(1.0).is_by_arrival
