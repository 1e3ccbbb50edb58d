"""A burst is held; of what is more than a burst a part is refused, and the rest is in time."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.settings import RouterSettings
from router.queueing.deadline import ttft_deadline_s
from router.scheduling.load_shedding import AdmissionShare, OverloadState
from router.types import Hold, Outcome, Reject, RejectReason
from tests.support.builders import busy, make_router, req
from tests.support.tenants_in_overload import SHORT, World, flood

MAX_LATE_S = 10.0
CAPACITY = 2000.0  # prompt tokens per second that the engines of `World` prefill, about


class TestOverloadState:
    @given(
        st.lists(
            st.tuples(
                st.floats(0.0, 2 * MAX_LATE_S),  # passing before the next arrival
                st.floats(-5.0, 3 * MAX_LATE_S),  # how late it would be
                st.floats(0.0, 5.0),  # how long it takes all engines
            ),
            max_size=50,
        )
    )
    def test_any_sequence_of_arrivals(self, arrivals):
        overload = OverloadState(MAX_LATE_S)
        now_s, refused_s = 0.0, float("-inf")
        for passing_s, late_s, service_s in arrivals:
            now_s += passing_s
            was_on = overload.is_on(now_s)
            assert was_on == (now_s < refused_s + MAX_LATE_S)
            retry_after_s = overload.refuse_if_late(late_s, service_s, now_s)
            is_refused = late_s > (0.0 if was_on else MAX_LATE_S)
            assert (retry_after_s is not None) == is_refused
            if is_refused:
                refused_s = now_s
                assert min(late_s, 60.0) <= retry_after_s + 1e-6
                assert retry_after_s <= 60.0 + 1e-6

    def test_those_refused_come_back_one_after_the_other(self):
        overload = OverloadState(MAX_LATE_S)
        assert [overload.refuse_if_late(20.0, 0.5, 0.0) for _ in range(3)] == [20.5, 21.0, 21.5]
        assert overload.refuse_if_late(1.0, 0.5, 9.0) == pytest.approx(13.0)


class TestAdmissionShare:
    def test_who_is_ahead_waits_for_the_others(self):
        share = AdmissionShare(10.0)
        for tenant, weight in (("a", 1.0), ("b", 3.0)):
            share.record_refused(tenant, weight, 0.0)
        share.record_admitted("a", 1.0, 100, 0.0)
        assert share.tokens_ahead("a", 0.0) == 300.0
        assert share.tokens_ahead("b", 0.0) == 0.0
        share.record_admitted("b", 3.0, 300, 1.0)
        assert share.tokens_ahead("a", 1.0) == 0.0

    def test_nobody_waits_for_those_who_get_all_they_want(self):
        share = AdmissionShare(10.0)
        share.record_refused("a", 1.0, 0.0)
        share.record_admitted("modest", 1.0, 10, 0.0)
        share.record_admitted("a", 1.0, 1000, 0.0)
        assert share.tokens_ahead("a", 0.0) == 0.0

    def test_wanting_less_earns_no_credit(self):
        share = AdmissionShare(10.0)
        share.record_refused("a", 1.0, 0.0)
        share.record_admitted("a", 1.0, 1000, 0.0)
        share.record_refused("late", 1.0, 1.0)
        assert share.tokens_ahead("a", 1.0) == 0.0

    def test_all_is_forgotten_in_the_end(self):
        share = AdmissionShare(10.0)
        share.record_refused("a", 1.0, 0.0)
        share.record_admitted("b", 1.0, 1000, 1.0)
        share.record_refused("b", 1.0, 1.0)
        share.record_admitted("a", 1.0, 10, 20.0)
        assert share.tokens_ahead("b", 20.0) == 0.0
        assert not share._refused


def overload_world(times_capacity: float, until_s: float, **settings) -> tuple[World, list]:
    world = World(max_late_s=MAX_LATE_S, max_hold_s=300.0, **settings)
    arrivals = flood(
        random.Random(0), "", 1.0, times_capacity * CAPACITY, until_s, (20, 100, 300), (1, 2)
    )
    world.run(arrivals, until_s)
    return world, arrivals


def num_in_time(world: World, arrivals: list, from_s: float) -> int:
    """Requests since then that were sent to an engine by their TTFT deadline."""
    late = {request.id for request in arrivals if request.arrival_s < from_s}
    placed = [world.requests[request_id] for request_id in world.placed_s]
    settings = RouterSettings()
    return sum(
        world.placed_s[request.id] <= ttft_deadline_s(request, settings)
        for request in placed
        if request.id not in late
    )


def test_at_five_times_the_capacity_as_many_are_in_time_as_ever():
    """The burst that comes first is admitted, and late; from then on nobody admitted is late."""
    usual, arrivals = overload_world(0.9, 90.0)
    usual_per_s = num_in_time(usual, arrivals, 60.0) / 30.0
    assert not usual.refused
    world, arrivals = overload_world(5.0, 90.0)
    assert num_in_time(world, arrivals, 60.0) / 30.0 > 0.9 * usual_per_s
    reasons = {reject.reason for reject in world.refused.values()}
    assert reasons == {RejectReason.OVERLOADED}
    assert all(0.0 < reject.retry_after_s < 60.001 for reject in world.refused.values())


def test_without_the_rule_nobody_is_in_time():
    world, arrivals = overload_world(5.0, 90.0)
    without = World(max_late_s=None, max_hold_s=300.0)
    without.run(arrivals, 90.0)
    assert num_in_time(without, arrivals, 60.0) < 0.1 * num_in_time(world, arrivals, 60.0)


def test_a_burst_is_held():
    world, _ = overload_world(1.5, 15.0)
    assert not world.refused


def test_tenants_are_admitted_by_weight():
    """Within a fifth: a request stands for few tokens or many, and none is cut."""
    rng = random.Random(0)
    world = World(max_late_s=MAX_LATE_S, max_hold_s=300.0)
    arrivals = flood(rng, "three", 3.0, 4000, 120.0, SHORT, (2,))
    arrivals += flood(rng, "one", 1.0, 4000, 120.0, (300, 600), (1,))
    arrivals += flood(rng, "modest", 1.0, 100, 120.0, SHORT, (1,))
    world.run(arrivals, 120.0)
    assert world.num_tokens["three"] / world.num_tokens["one"] == pytest.approx(3.0, rel=0.2)
    num_modest = sum(request.tenant == "modest" for request in arrivals)
    assert len(world.waited_s["modest"]) > 0.85 * num_modest


def test_what_an_engine_failed_is_not_refused():
    router = make_router(max_late_s=1.0)
    router.on_snapshot("r0", busy(1, num_pending_prefill_tokens=10_000), 0.0)
    router.on_arrival(req("a", 100_000), 0.0)
    [refused] = router.on_arrival(req("b"), 1.0)
    assert isinstance(refused, Reject)
    assert refused.reason is RejectReason.OVERLOADED
    assert router.on_arrival(req("c", tried=("r9",), retried_s=1.0), 1.0) == [Hold("c")]
    assert router.outcomes == {Outcome.REJECTED: 1}


def test_nobody_is_refused_while_no_engine_works():
    router = make_router(0, max_late_s=1.0)
    for number in range(20):
        request = req(f"q{number}", 10_000)
        assert router.on_arrival(request, 0.0) == [Hold(request.id)]


def test_a_target_that_no_engine_can_meet_makes_nobody_late():
    router = make_router(ttft_target_base_s=0.001, ttft_target_s_per_token=0.0, max_late_s=1.0)
    router.on_snapshot("r0", busy(1, num_pending_prefill_tokens=300), 0.0)
    assert router.on_arrival(req("a", 1000), 0.0) == [Hold("a")]
