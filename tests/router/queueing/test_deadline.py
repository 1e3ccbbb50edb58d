"""Classes and TTFT deadlines: who is served first, in the gateway and inside the engine."""

import msgspec
import pytest

from router.core.settings import RouterSettings
from router.queueing.deadline import edf_key_s, ttft_deadline_s, unshifted_edf_key_s
from router.types import Dispatch, Hold, RequestClass
from tests.router.core.short_ways import FULL
from tests.support.builders import busy, make_router, req

# Half of each step of 100 tokens stays free of any one long prompt.
CAPPED = {"max_prefill_chunk": 50, "num_kv_tokens": 100_000}
PLENTY = 100_000


def of(name: str, num_tokens: int, priority_class: RequestClass, arrival_s: float = 0.0):
    return req(name, num_tokens, priority_class=priority_class, arrival_s=arrival_s)


def test_the_ttft_target_grows_with_the_prompt_and_shrinks_with_the_class():
    settings = RouterSettings(
        ttft_target_base_s=1.0, ttft_target_s_per_token=0.01, ttft_target_batch_s=100.0
    )
    targets_s = [ttft_deadline_s(of("a", 200, kind, 7.0), settings) - 7.0 for kind in RequestClass]
    assert targets_s == pytest.approx([1.5, 3.0, 103.0])


def test_the_order_asks_no_more_patience_than_the_engines_need():
    """1.5 times what a prompt's prefill takes, where that is less than its TTFT target."""
    settings = RouterSettings(ttft_target_base_s=0.5, ttft_target_s_per_token=0.002)
    request = of("a", 1000, RequestClass.STANDARD, 7.0)
    assert edf_key_s(request, settings) == ttft_deadline_s(request, settings) == 9.5
    slow, fast = (msgspec.structs.replace(request, prefill_s_per_token=s) for s in (1.7e-3, 2.5e-5))
    assert edf_key_s(slow, settings) == 9.5
    assert edf_key_s(fast, settings) == pytest.approx(7.5375)
    assert ttft_deadline_s(fast, settings) == 9.5


def test_a_long_prompt_is_not_passed_for_as_long_where_prefill_is_fast():
    """Its TTFT target is 6.5 s; ten thousand tokens/s take 0.3 s, and so it waits 0.95 s."""
    router = make_router(engine={"max_num_batched_tokens": 1000})
    fast = busy(1, prefill_tokens_per_s=10_000.0, num_pending_prefill_tokens=50_000)
    router.on_snapshot("r0", fast, 0.0)
    for name, num_tokens, arrival_s in (("long", 3000, 0.0), ("soon", 10, 0.3), ("late", 10, 1.0)):
        request = req(name, num_tokens, arrival_s=arrival_s)
        assert router.on_arrival(request, arrival_s) == [Hold(name)]
    assert [request.id for request in router._queue.in_order("m")] == ["soon", "long", "late"]


def test_classes_leave_the_queue_in_their_order():
    router = make_router()
    router.on_arrival(req("full", 5000), 0.0)
    for kind in reversed(RequestClass):
        assert router.on_arrival(of(kind.value, 10, kind), 0.0) == [Hold(kind.value)]
    freed = router.on_snapshot("r0", busy(last_booking=1), 1.0)
    assert [decision.request_id for decision in freed] == ["interactive", "standard", "batch"]


def test_batch_work_comes_before_fresh_work_in_the_end():
    """It yields, but it does not starve."""
    router = make_router(ttft_target_batch_s=50.0, max_hold_s=1000.0)
    router.on_arrival(req("full", 5000), 0.0)
    router.on_arrival(of("batch", 10, RequestClass.BATCH), 0.0)
    router.on_arrival(of("fresh", 10, RequestClass.STANDARD, arrival_s=51.0), 51.0)
    freed = router.on_snapshot("r0", busy(last_booking=1), 52.0)
    assert [decision.request_id for decision in freed] == ["batch", "fresh"]


def capped_router(**settings):
    """One engine in the middle of a long prompt; another long one is held."""
    router = make_router(engine=CAPPED, **settings)
    assert router.on_arrival(req("long", 2000), 0.0) == [Dispatch("long", "r0", 1)]
    reading = busy(
        1,
        last_booking=1,
        num_pending_prefill_tokens=1900,
        num_step_demand_tokens=50,
        num_free_kv_tokens=PLENTY,
    )
    router.on_snapshot("r0", reading, 0.1)
    assert router.on_arrival(req("longer", 3000, arrival_s=0.2), 0.2) == [Hold("longer")]
    return router


def test_a_short_prompt_joins_an_engine_that_reads_a_long_one():
    router = capped_router()
    assert router.on_arrival(req("short", 40, arrival_s=0.3), 0.3) == [Dispatch("short", "r0", 2)]


def test_but_no_more_of_them_than_the_next_step_has_room_for():
    router = capped_router()
    decisions = [router.on_arrival(req(f"s{n}", 40, arrival_s=0.3), 0.3)[0] for n in range(6)]
    num_placed = sum(isinstance(decision, Dispatch) for decision in decisions)
    assert 2 <= num_placed <= 4  # a step of 100 tokens, 50 of them the long prompt's; or two steps
    assert isinstance(decisions[-1], Hold)


def test_past_its_deadline_a_long_prompt_is_passed_no_more():
    router = capped_router()  # "longer" is due at 0.2 + 0.5 + 2.0 s
    assert router.on_arrival(req("before", 40, arrival_s=2.5), 2.5) == [Dispatch("before", "r0", 2)]
    router.on_tick(3.5)
    assert router.on_arrival(req("after", 40, arrival_s=3.6), 3.6) == [Hold("after")]
    idle = busy(2, last_booking=2, num_free_kv_tokens=PLENTY)
    freed = router.on_snapshot("r0", idle, 3.7)
    assert [decision.request_id for decision in freed] == ["longer", "after"]


def test_without_the_order_nobody_passes():
    router = capped_router(ablate=("order",))
    assert router.on_arrival(req("short", 40, arrival_s=0.3), 0.3) == [Hold("short")]


def test_a_short_prompts_prediction_does_not_count_what_it_passes():
    router = capped_router()
    (replica,) = router._fleet
    assert replica.ttft_s(40, 0.3) < replica.ttft_s(60, 0.3) - replica.chunk_overhead_s


def test_the_engine_gets_the_deadline_only_from_policies_that_hold():
    router = make_router()
    request = req("a", 100, arrival_s=5.0)
    assert router.discipline.engine_priority_s(request) == ttft_deadline_s(request, router.settings)
    router.set_policy("round_robin", 0.0)
    assert router.discipline.engine_priority_s(request) is None


class TestOwnPriority:
    def test_orders_the_requests_of_a_tenant_in_the_queue(self):
        router = make_router()
        router.on_arrival(req("first", FULL, tenant="a"), 0.0)
        for request_id, put_off_s in (("usual", 0.0), ("later", 5.0), ("sooner", -5.0)):
            router.on_arrival(req(request_id, 10, tenant="a", put_off_s=put_off_s), 0.0)
        order = [request.id for request in router._queue.in_order("m")]
        assert order == ["sooner", "usual", "later"]

    def test_and_nobody_elses(self):
        router = make_router()
        router.on_arrival(req("first", FULL), 0.0)
        router.on_arrival(req("b", 10, tenant="b"), 0.0)
        router.on_arrival(req("a0", 10, tenant="a", put_off_s=-60.0), 0.0)
        router.on_arrival(req("a1", 10, tenant="a", put_off_s=-60.0), 0.0)
        assert [request.id for request in router._queue.in_order("m")] == ["b", "a0", "a1"]

    def test_inside_an_engine_nobody_comes_before_other_tenants(self):
        router = make_router()
        usual = router.discipline.engine_priority_s(req("a"))

        def shift_s(**fields) -> float:
            return router.discipline.engine_priority_s(req("a", **fields)) - usual

        assert shift_s(put_off_s=5.0) == shift_s(put_off_s=5.0, tenant="a") == 5.0
        assert shift_s(put_off_s=-5.0) == -5.0
        assert shift_s(put_off_s=-5.0, tenant="a") == 0.0

    def test_is_no_reason_to_be_refused(self):
        """Whoever wants to come sooner is not late by that."""
        settings = RouterSettings()
        request = req("a", 100, put_off_s=-60.0)
        assert unshifted_edf_key_s(request, settings) == edf_key_s(req("a", 100), settings)


def test_a_models_own_targets_go_before_those_of_all():
    settings = RouterSettings(ttft_target_base_s=1.0, ttft_target_s_per_token=0.01)
    request = of("a", 200, RequestClass.STANDARD, 7.0)
    own = msgspec.structs.replace(request, ttft_target_base_s=0.0)
    assert ttft_deadline_s(own, settings) == pytest.approx(9.0)
    own = msgspec.structs.replace(own, ttft_target_s_per_token=0.05)
    assert ttft_deadline_s(own, settings) == edf_key_s(own, settings) == pytest.approx(17.0)
