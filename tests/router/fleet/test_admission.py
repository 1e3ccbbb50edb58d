import math

from router.fleet.admission import (
    Admission,
    accepts_work,
    admission,
    kv_need_tokens,
    meets_tpot_target,
    window_tokens,
)
from router.resilience.breaker import TripReason
from tests.support.builders import busy, make_replica, req, snapshot


def test_window_is_one_step_and_what_is_prefilled_while_we_react():
    replica = make_replica()
    replica.prefill_tokens_per_s = 500.0
    assert window_tokens(replica) == 100 + 10
    replica.prefill_tokens_per_s = 1e9
    assert window_tokens(replica) == 2 * 100


def test_saturated_at_the_window_and_not_below_it():
    replica = make_replica()
    replica.book(req("a", 5000), num_kv_tokens=5000, now_s=0.0)
    assert admission(replica) is Admission.SATURATED
    replica.receive(busy(last_booking=1, num_pending_prefill_tokens=99), 1.0)
    assert admission(replica) is Admission.ANY


def test_beside_a_long_prompt_it_accepts_short_ones():
    replica = make_replica(max_prefill_chunk=50)
    replica.receive(busy(num_pending_prefill_tokens=5000, num_step_demand_tokens=50), 0.0)
    assert admission(replica) is Admission.SHORT_ONLY
    replica.receive(busy(2, num_pending_prefill_tokens=5000, num_step_demand_tokens=200), 0.0)
    assert admission(replica) is Admission.SATURATED


def test_saturated_when_all_sequences_are_taken():
    replica = make_replica(max_num_seqs=4)
    replica.receive(busy(num_running_reqs=2, num_waiting_reqs=1), 0.0)
    assert admission(replica) is Admission.ANY
    replica.book(req("a", 1), num_kv_tokens=1, now_s=0.0)
    assert admission(replica) is Admission.SATURATED


def test_engines_that_drain_or_whose_breaker_is_open_take_nothing():
    replica = make_replica()
    assert accepts_work(replica)
    replica.is_draining = True
    assert not accepts_work(replica)
    assert admission(replica) is Admission.UNAVAILABLE
    replica.is_draining = False
    replica.breaker.trip(TripReason.LOST, 0.0)
    assert not accepts_work(replica)


def test_each_sequence_needs_room_to_begin():
    one, three = req("a", 100), req("a", 100, num_sequences=3)
    assert kv_need_tokens(three) - kv_need_tokens(one) == 2 * (kv_need_tokens(one) - 100)


def test_an_empty_engine_has_room_for_anything():
    """vLLM refuses what can never fit, with the right message; nothing waits for ever."""
    replica = make_replica()
    replica.receive(snapshot(num_free_kv_tokens=9_984), 0.0)  # it keeps a block to itself
    assert replica.room_tokens == math.inf
    replica.receive(busy(2, num_free_kv_tokens=9_000), 0.0)
    assert replica.room_tokens == 9_000


def test_meets_the_tpot_target_while_one_more_decodes_in_time():
    replica = make_replica()
    replica.receive(busy(num_decoding_reqs=4), 0.0)
    replica.predictor.step_base_s, replica.predictor.decode_s = 0.02, 0.01
    assert meets_tpot_target(req("a"), replica, 0.0701)
    assert not meets_tpot_target(req("a"), replica, 0.0699)
    assert meets_tpot_target(req("a", num_sequences=3), replica, 0.0901)
    assert not meets_tpot_target(req("a", num_sequences=3), replica, 0.0899)


def test_of_a_list_of_prompts_one_has_to_have_room():
    """vLLM begins as many as it has room for: the list need not wait for an empty engine."""
    one = req(num_tokens=300, num_sequences=2)
    many = req(num_tokens=300 * 100, num_sequences=2 * 100, num_prompts=100)
    assert kv_need_tokens(many) == kv_need_tokens(one)
