"""How a request enters, waits and ends, and what its engines do meanwhile."""

import pytest

from router.core.router import Router
from router.core.settings import RouterSettings
from router.types import Dispatch, Hold, Outcome, Reject, RejectReason, Usage
from tests.router.core.short_ways import FULL, ends, given_up, occupy
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
        assert router.failures.on_attempt_failed("x", "r0", None, 0.0) == []
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
        decisions = fail_attempt(router, retried, None, 1.0, num_output_tokens=8)
        assert decisions == [Hold(retried)]  # r1 is full
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

    @pytest.mark.parametrize(
        ("took_s", "error"),
        [
            (9 * 0.0201, 0.0),  # the cold guess
            (9 * 0.01005, 1.0),  # twice as fast as predicted
            (1e-5, 9 * 0.0201 / 0.05),  # in one piece: no division by nearly nothing
        ],
    )
    def test_the_time_per_token_is_compared_over_all_tokens(self, took_s, error):
        router = make_router()
        router.on_arrival(req("a", 100), 0.0)
        router.on_first_token("a", 1.0)
        router.on_finish("a", Usage(num_output_tokens=10), 1.0 + took_s)
        accuracy = router.state(2.0).accuracy.tpot
        assert accuracy.error_p50 == pytest.approx(error, abs=1e-3)


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
