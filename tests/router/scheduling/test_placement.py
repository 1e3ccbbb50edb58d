"""Order, reservations and back-filling. Windows are wide here: KV room is what lacks."""

import pytest

from router.core.router import Router
from router.resilience.breaker import Failure
from router.scheduling.policies.headway import prefill_cost_s
from router.types import Dispatch, Hold
from tests.support.builders import busy, fail_attempt, info, make_replica, make_router, req

WIDE = {"max_num_batched_tokens": 100_000, "num_kv_tokens": 10_000}


def kv_router(*free_kv_tokens: int, **settings) -> Router:
    """A router whose busy engines r0, r1, … have so many KV tokens free."""
    router = make_router(len(free_kv_tokens), engine=WIDE, **settings)
    for index, num_tokens in enumerate(free_kv_tokens):
        router.on_snapshot(f"r{index}", busy(1, num_free_kv_tokens=num_tokens), 0.0)
    return router


def test_the_most_urgent_goes_first():
    router = make_router()
    router.on_arrival(req("full", 5000), 0.0)
    router.on_arrival(req("document", 4000), 0.0)
    router.on_arrival(req("question", 10), 0.1)
    freed = router.on_snapshot("r0", busy(last_booking=1), 1.0)
    assert freed == [Dispatch("question", "r0", 2), Dispatch("document", "r0", 3)]


def test_a_blocked_head_keeps_the_engine_that_lacks_least():
    """Small ones behind may go elsewhere, but not there."""
    router = kv_router(800, 500)
    assert router.on_arrival(req("large", 1000, arrival_s=0.0), 0.0) == [Hold("large")]
    small = [req(f"s{number}", 200, arrival_s=9.0) for number in range(2)]
    assert router.on_arrival(small[0], 9.0) == [Dispatch("s0", "r1", 1)]  # back-filled
    assert router.on_arrival(small[1], 9.0) == [Hold("s1")]  # room at r0 only, and that is kept
    roomier = busy(2, num_free_kv_tokens=1200)
    assert router.on_snapshot("r0", roomier, 10.0) == [Dispatch("large", "r0", 1)]


def test_followers_go_once_the_blocked_head_has_left():
    router = kv_router(800)
    router.on_arrival(req("large", 1000, arrival_s=0.0), 0.0)
    assert router.on_arrival(req("small", 200, arrival_s=9.0), 9.0) == [Hold("small")]
    assert router.on_cancel("large", 10.0) == [Dispatch("small", "r0", 1)]


def test_followers_join_the_head_where_there_is_room_for_both():
    """In one pass: what was kept for the head is free again once it is placed."""
    router = kv_router(800)
    router.on_arrival(req("large", 1000, arrival_s=0.0), 0.0)
    router.on_arrival(req("small", 200, arrival_s=9.0), 9.0)
    both = [Dispatch("large", "r0", 1), Dispatch("small", "r0", 2)]
    assert router.on_snapshot("r0", busy(2, num_free_kv_tokens=2000), 10.0) == both


def test_a_more_urgent_request_is_not_bound_by_a_reservation():
    router = kv_router(800)
    router.on_arrival(req("large", 1000, arrival_s=0.0), 0.0)  # its turn is after twice its prefill
    assert router.on_arrival(req("urgent", 10, arrival_s=0.1), 0.1) == [Dispatch("urgent", "r0", 1)]


def test_the_reserved_engine_does_not_change_while_the_head_waits():
    """Or two engines could fill up alternately, and the head starve."""
    router = kv_router(800, 500)
    router.on_arrival(req("large", 1000, arrival_s=0.0), 0.0)
    router.on_snapshot("r0", busy(2, num_free_kv_tokens=700), 1.0)  # its decodes grew
    router.on_snapshot("r1", busy(2, num_free_kv_tokens=750), 1.0)
    [dispatch] = router.on_arrival(req("small", 200, arrival_s=9.0), 9.0)
    assert dispatch.replica_id == "r1"


def test_a_reserved_engine_that_is_lost_is_replaced():
    router = kv_router(800, 500)
    router.on_arrival(req("large", 1000, arrival_s=0.0), 0.0)
    router.on_replica_down("r0", 1.0)
    assert router.on_arrival(req("small", 200, arrival_s=9.0), 9.0) == [Hold("small")]


def test_an_engine_reserved_for_one_model_is_so_for_its_other_names():
    router = make_router(1, engine=WIDE | {"aliases": ("lora",)})
    router.on_snapshot("r0", busy(1, num_free_kv_tokens=800), 0.0)
    router.on_arrival(req("large", 1000, arrival_s=0.0), 0.0)
    later = req("small", 200, model="lora", arrival_s=9.0)
    assert router.on_arrival(later, 9.0) == [Hold("small")]


def test_a_model_without_room_does_not_hide_another():
    router = make_router(1)
    router.on_replica_up("n0", info(model="n"), 0.0)
    for model in "mn":
        router.on_arrival(req(f"full-{model}", 5000, model=model), 0.0)
        router.on_arrival(req(f"next-{model}", 10, model=model), 0.0)
    assert router.on_finish("full-n", None, 1.0) == [Dispatch("next-n", "n0", 2)]


def test_an_emptied_engine_takes_what_never_fits():
    router = kv_router(800)
    router.on_arrival(req("huge", 10**6, arrival_s=0.0), 0.0)
    empty = busy(2, num_running_reqs=0, num_decoding_reqs=0, num_free_kv_tokens=9_984)
    assert router.on_snapshot("r0", empty, 1.0) == [Dispatch("huge", "r0", 1)]


@pytest.mark.parametrize("target_s", [{"m": 0.0205}, {"*": 0.0205}, {"m": 0.0205, "*": 9.0}])
def test_an_engine_past_the_tpot_target_gets_nothing_while_another_is_below_it(target_s):
    router = make_router(2, engine={"max_num_seqs": 64}, tpot_target_s=target_s)
    crowded = busy(1, num_running_reqs=30, num_decoding_reqs=30)  # 20 ms + 0.1 ms each, cold
    router.on_snapshot("r0", crowded, 0.0)
    router.on_snapshot("r1", busy(1, num_pending_prefill_tokens=90), 0.0)
    assert router.on_arrival(req("a", 10), 0.0)[0].replica_id == "r1"
    router.on_replica_draining("r1", 0.1)
    assert router.on_arrival(req("b", 10), 0.1) == [Dispatch("b", "r0", 1)]  # none held for it


@pytest.mark.parametrize(("own_s", "engine"), [(0.0203, "r1"), (9.0, "r0"), (None, "r0")])
def test_a_models_own_tpot_target_goes_before_that_of_all(own_s, engine):
    router = make_router(2, engine={"max_num_seqs": 64}, tpot_target_s={"m": 9.0})
    router.on_snapshot("r0", busy(1, num_running_reqs=2, num_decoding_reqs=2), 0.0)
    router.on_snapshot("r1", busy(1, num_pending_prefill_tokens=90), 0.0)
    request = req("a", 10, tpot_target_s=own_s)
    assert router.on_arrival(request, 0.0)[0].replica_id == engine


def test_what_one_engine_keeps_goes_there_alone():
    router = kv_router(5000, 5000)
    for number in range(4):
        pinned = req(f"p{number}", 100, only_at="r1")
        assert router.on_arrival(pinned, 0.0) == [Dispatch(f"p{number}", "r1", number + 1)]


def test_what_waits_for_one_engine_keeps_nobody_from_the_others():
    router = kv_router(5000, 500)
    assert router.on_arrival(req("pinned", 1000, only_at="r1"), 0.0) == [Hold("pinned")]
    assert router.on_arrival(req("large", 2000, arrival_s=1.0), 1.0) == [Dispatch("large", "r0", 1)]
    roomier = busy(2, num_free_kv_tokens=3000)
    assert router.on_snapshot("r1", roomier, 2.0) == [Dispatch("pinned", "r1", 1)]


def test_what_one_engine_keeps_is_not_tried_elsewhere():
    router = kv_router(5000, 5000)
    router.on_arrival(req("pinned", 100, only_at="r1"), 0.0)
    again = fail_attempt(router, "pinned", Failure.ERROR, 0.1, can_retry=True)
    assert [each.replica_id for each in again if isinstance(each, Dispatch)] == ["r1"]


def test_a_long_context_is_worth_what_others_would_wait_for_it_elsewhere():
    """Its own prefill, that of what decodes there, and what it takes the cache's room of."""
    replica = make_replica()
    replica.receive(busy(num_running_reqs=4, num_decoding_reqs=4), 0.0)
    prefill_s = 100 * replica.token_s
    request = req("a", 100)
    own_s = replica.ttft_s(100, 0.0)
    assert prefill_cost_s(request, replica, 0.0, 0.0) == pytest.approx(own_s + 4 * prefill_s)
    assert prefill_cost_s(request, replica, 0.8, 0.0) == pytest.approx(own_s + 8 * prefill_s)
