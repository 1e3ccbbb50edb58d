"""Who is suspected when an engine dies, and does it stop the one who did it and nobody else?"""

import random

import pytest

from router.types import Dispatch, Fail, Hold, Reject, RejectReason
from tests.router.scheduling.poisoned_fleet import PoisonedFleet
from tests.support.builders import busy, fail_attempt, info, make_router, req


def lose(router, replica_id, now_s, **options):
    """An engine dies with one request on board; return what follows for that."""
    [request_id] = [
        a.request.id for a in router._attempts.at_replica(router._fleet.get(replica_id))
    ]
    router.on_replica_down(replica_id, now_s)
    return fail_attempt(router, request_id, None, now_s, **options)


class TestOneSuspect:
    def test_the_last_engine_is_not_risked(self):
        router = make_router(2)
        [first] = router.on_arrival(req("a"), 0.0)
        assert lose(router, first.replica_id, 1.0) == [Hold("a")]
        [again] = router.on_replica_up("new", info(), 60.0)
        assert again == Dispatch("a", "new", 1)  # the one that has nobody to lose

    def test_who_had_decoded_for_long_goes_on_at_once(self):
        router = make_router(2)
        [first] = router.on_arrival(req("a"), 0.0)
        [again] = lose(router, first.replica_id, 1.0, num_output_tokens=8, has_begun=True)
        assert isinstance(again, Dispatch)

    def test_a_second_death_tells_and_the_body_is_refused_for_a_while(self):
        router = make_router(3, refuse_s=600.0)
        [first] = router.on_arrival(req("a", fingerprint=7), 0.0)
        [again] = lose(router, first.replica_id, 1.0)
        assert lose(router, again.replica_id, 2.0) == [
            Reject("a", RejectReason.ENDS_ENGINES, pytest.approx(600.0))
        ]
        refused = Reject("b", RejectReason.ENDS_ENGINES, pytest.approx(590.0))
        assert router.on_arrival(req("b", fingerprint=7, arrival_s=12.0), 12.0) == [refused]
        [other] = router.on_arrival(req("c", fingerprint=8, arrival_s=12.0), 12.0)
        assert isinstance(other, Dispatch)
        state = router.state(12.0).suspects
        assert (state.num_suspects, state.num_refused, state.num_rejected) == (0, 1, 2)
        [later] = router.on_arrival(req("d", fingerprint=7, arrival_s=602.0), 602.0)
        assert isinstance(later, Dispatch)

    def test_a_reply_that_had_begun_fails(self):
        router = make_router(3)
        [first] = router.on_arrival(req("a"), 0.0)
        [again] = lose(router, first.replica_id, 1.0, num_output_tokens=2, has_begun=True)
        decisions = lose(router, again.replica_id, 2.0, num_output_tokens=1, has_begun=True)
        assert decisions == [Fail("a")]

    def test_even_the_only_engine_is_lost_twice_at_most(self):
        router = make_router(1)
        router.on_arrival(req("a", fingerprint=7), 0.0)
        assert lose(router, "r0", 1.0) == [Hold("a")]
        assert router.on_replica_up("r1", info(), 60.0) == [Dispatch("a", "r1", 1)]
        [rejected] = lose(router, "r1", 61.0)
        assert rejected.reason is RejectReason.ENDS_ENGINES

    def test_it_probes_the_other_engine_if_nobody_else_does_and_only_once(self):
        router = make_router(2, breaker={"cooldown_jitter": 0.0})
        [first] = router.on_arrival(req("a"), 0.0)
        router.on_replica_down(first.replica_id, 1.0)
        router.on_replica_up(first.replica_id, info(), 1.1)  # its breaker is as it was: open
        assert fail_attempt(router, "a", None, 1.2) == [Hold("a")]
        [probe] = router.on_tick(3.0)
        assert (probe.request_id, probe.replica_id) == ("a", first.replica_id)
        router.on_replica_down(first.replica_id, 4.0)
        router.on_replica_up(first.replica_id, info(), 4.1)
        assert fail_attempt(router, "a", None, 4.2) == [Hold("a")]  # not refused for it
        assert [router.on_tick(4.2 + seconds) for seconds in range(1, 20)] == [[]] * 19

    def test_nobody_joins_it_before_it_has_got_on(self):
        router = make_router(3)
        [first] = router.on_arrival(req("a"), 0.0)
        [again] = lose(router, first.replica_id, 1.0)
        assert router.state(1.0).replicas[again.replica_id].is_quarantined
        for number in range(6):
            [dispatch] = router.on_arrival(req(f"q{number}", arrival_s=1.0), 1.0)
            assert dispatch.replica_id != again.replica_id
        router.on_answer("a", again.replica_id, 1.5)
        router.on_snapshot(again.replica_id, busy(7, num_steps_total=7), 30.0)
        assert router.state(30.0).replicas[again.replica_id].is_quarantined
        router.on_snapshot(again.replica_id, busy(8, num_steps_total=8), 30.1)
        assert not router.state(30.1).replicas[again.replica_id].is_quarantined

    def test_it_waits_for_those_who_have_not_got_on_and_nobody_comes_after_them(self):
        router = make_router(3)
        homes = {}
        for number in range(3):
            [dispatch] = router.on_arrival(req(f"q{number}"), 0.0)
            homes[dispatch.replica_id] = dispatch.request_id
        assert len(homes) == 3
        dying = next(iter(homes))
        assert lose(router, dying, 1.0) == [Hold(homes[dying])]
        [claimed] = [r for r, state in router.state(1.0).replicas.items() if state.is_quarantined]
        for number in range(4):
            [dispatch] = router.on_arrival(req(f"s{number}", arrival_s=1.0), 1.0)
            assert dispatch.replica_id != claimed
        router.on_answer(homes[claimed], claimed, 1.2)
        assert router.on_snapshot(claimed, busy(7, num_steps_total=7), 2.0) == []
        [again] = router.on_snapshot(claimed, busy(8, num_steps_total=8), 2.1)
        assert (again.request_id, again.replica_id) == (homes[dying], claimed)

    def test_its_engine_is_free_again_when_it_leaves(self):
        router = make_router(3)
        [first] = router.on_arrival(req("a"), 0.0)
        [again] = lose(router, first.replica_id, 1.0)
        router.on_cancel("a", 1.1)
        assert not router.state(1.1).replicas[again.replica_id].is_quarantined

    def test_one_that_is_answered_is_none_any_more(self):
        router = make_router(3)
        [first] = router.on_arrival(req("a", fingerprint=7), 0.0)
        [again] = lose(router, first.replica_id, 1.0)
        router.on_answer("a", again.replica_id, 1.5)
        router.on_finish("a", None, 2.0)
        assert router.state(2.0).suspects.num_suspects == 0

    def test_with_one_that_is_answered_all_of_its_body_are_cleared(self):
        """Many send the same: a probe, a benchmark. They must not wait for one another for long."""
        router = make_router(3)
        [first] = router.on_arrival(req("a", fingerprint=7), 0.0)
        [again] = lose(router, first.replica_id, 1.0)
        for number in range(4):
            request = req(f"b{number}", fingerprint=7, arrival_s=1.0)
            assert router.on_arrival(request, 1.0) == [Hold(request.id)]
        router.on_answer("a", again.replica_id, 1.5)
        decisions = router.on_finish("a", None, 2.0)
        assert {each.request_id for each in decisions} == {"b0", "b1", "b2", "b3"}

    def test_two_of_one_body_are_not_tried_at_the_same_time(self):
        router = make_router(4)
        [first] = router.on_arrival(req("a", fingerprint=7), 0.0)
        [again] = lose(router, first.replica_id, 1.0)
        assert router.on_arrival(req("b", fingerprint=7, arrival_s=1.0), 1.0) == [Hold("b")]
        decisions = lose(router, again.replica_id, 2.0)
        assert {(each.request_id, each.reason) for each in decisions} == {
            ("a", RejectReason.ENDS_ENGINES),
            ("b", RejectReason.ENDS_ENGINES),
        }

    def test_who_waits_for_an_engine_alone_is_in_nobodys_way(self):
        router = make_router(2)
        [first] = router.on_arrival(req("a"), 0.0)
        lose(router, first.replica_id, 1.0)
        for number in range(8):
            [dispatch] = router.on_arrival(req(f"q{number}", arrival_s=1.0), 1.0)
            assert isinstance(dispatch, Dispatch)
        [held] = router.on_arrival(req("q8", arrival_s=1.0), 1.0)  # 8 sequences at most
        assert held == Hold("q8")
        assert router.on_finish("q0", None, 2.0) == [Dispatch("q8", dispatch.replica_id, 9)]


class TestWhoIsNotSuspected:
    def test_who_was_alone_at_first_but_had_company_when_the_engine_died(self):
        router = make_router(3)
        [first] = router.on_arrival(req("a"), 0.0)
        [again] = lose(router, first.replica_id, 1.0)
        engine = again.replica_id
        router.on_answer("a", engine, 1.5)
        router.on_snapshot(engine, busy(9, num_steps_total=8), 1.6)  # it has got on
        sent = [router.on_arrival(req(f"q{n}", arrival_s=1.6), 1.6)[0] for n in range(6)]
        company = [each.request_id for each in sent if each.replica_id == engine]
        assert company
        router.on_replica_down(engine, 2.0)
        for request_id in (*company, "a"):  # whoever is told of first
            [decision] = fail_attempt(router, request_id, None, 2.0)
            assert not isinstance(decision, Reject | Fail)

    def test_a_connection_that_drains(self):
        router = make_router(2)
        [first] = router.on_arrival(req("a"), 0.0)
        router.on_replica_draining(first.replica_id, 0.5)
        [again] = lose(router, first.replica_id, 1.0)
        assert isinstance(again, Dispatch)

    def test_who_was_on_an_engine_that_fell_silent(self):
        """A dead node, or network, tells nothing of a request."""
        router = make_router(1, engine={"heartbeat_s": 0.5}, stale_s=3.0)
        [first] = router.on_arrival(req("a"), 0.0)
        router.on_replica_up("r1", info(heartbeat_s=0.5), 8.0)
        [evacuate] = router.on_tick(9.0)
        assert evacuate.replica_id == first.replica_id
        [again] = fail_attempt(router, "a", None, 9.0)
        assert again == Dispatch("a", "r1", 1)

    def test_the_probe_of_an_engine_that_was_sick_before(self):
        router = make_router(2, breaker={"cooldown_jitter": 0.0, "slow_start_s": 0.0})
        [first] = router.on_arrival(req("a"), 0.0)
        router.on_replica_down(first.replica_id, 1.0)
        router.on_replica_up(first.replica_id, info(), 1.1)
        fail_attempt(router, "a", None, 1.1, num_output_tokens=8)
        router.on_tick(3.0)
        sent = [router.on_arrival(req(f"q{n}", arrival_s=3.0), 3.0)[0] for n in range(4)]
        [probe] = [each for each in sent if each.replica_id == first.replica_id]
        router.on_replica_down(first.replica_id, 4.0)
        [again] = fail_attempt(router, probe.request_id, None, 4.0)
        assert isinstance(again, Dispatch)


@pytest.mark.parametrize("num_engines", [1, 2, 3, 6])
@pytest.mark.parametrize("seed", range(4))
def test_at_most_two_engines_are_lost_to_a_body_and_nobody_else_is(num_engines, seed):
    rng = random.Random(seed)
    poisons = {f"poison{number}": rng.uniform(0.05, 0.6) for number in range(3)}
    world = PoisonedFleet(num_engines, poisons, max_hold_s=1000.0, suspect_hold_s=1000.0, seed=seed)
    for number in range(150):
        world.at(rng.uniform(0.0, 300.0), world.arrive, f"good{number}")
    for name in poisons:
        # The one who sends it tries again, as SDKs do.
        for copy in range(4):
            world.at(rng.uniform(0.0, 300.0), world.arrive, f"{name}#{copy}")
    world.run(1500.0)
    assert max(world.ended_by.values()) <= 2, world.ended_by
    assert not world.was_last
    ends = world.done
    assert {ends.get(f"good{number}") for number in range(150)} == {"completed"}
    assert {ends.get(f"{name}#{copy}", "open") for name in poisons for copy in range(4)}.isdisjoint(
        {"open", "completed"}
    )
    state = world.router.state(1500.0)
    assert not any(replica.is_quarantined for replica in state.replicas.values())
    assert state.held.num_requests == state.num_placed == 0
    assert all(not replica.ledger.num_open for replica in state.replicas.values())
    assert len(state.replicas) == num_engines
