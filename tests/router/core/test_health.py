"""Which engines get no work, and when do they get some again?"""

import pytest

from router.resilience.breaker import BreakerState, TripReason
from router.types import Dispatch, Evacuate, Hold
from tests.router.core.short_ways import occupy
from tests.support.builders import busy, fail_attempt, info, make_router, req, snapshot

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

    def test_an_engine_whose_core_lives_is_kept_and_gets_nothing_new(self):
        """Its API layer is busy: no snapshot comes for a while, which opens no breaker."""
        router = make_router(2, engine=ALIVE, stale_s=3.0)
        [first] = router.on_arrival(req("a"), 0.0)
        mute, other = first.replica_id, {"r0": "r1", "r1": "r0"}[first.replica_id]
        report = {"last_booking": 1, "num_inflight_reqs": 1}
        router.on_snapshot(mute, busy(1, **report), 0.1)
        for half_seconds in range(1, 20):
            now_s = half_seconds / 2
            router.on_alive(mute, half_seconds, 1, now_s)
            router.on_snapshot(other, snapshot(half_seconds), now_s)
            assert router.on_tick(now_s) == []
            is_mute = router.state(now_s).replicas[mute].is_mute
            assert is_mute == (now_s > 1.1)
        assert router.on_arrival(req("b"), 9.6) == [Dispatch("b", other, 1)]
        router.on_snapshot(mute, busy(2, **report), 9.7)
        assert not router.state(9.7).replicas[mute].is_mute
        assert router.state(9.7).breaker_events == []

    def test_a_mute_engine_that_has_nothing_left_to_do_does_not_hang(self):
        router = make_router(2, engine=ALIVE)
        [first] = router.on_arrival(req("a"), 0.0)
        mute, other = first.replica_id, {"r0": "r1", "r1": "r0"}[first.replica_id]
        report = {"last_booking": 1, "num_inflight_reqs": 1}
        router.on_snapshot(mute, busy(1, **report), 0.1)
        for half_seconds in range(1, 20):
            now_s = half_seconds / 2
            router.on_alive(mute, 7, 0, now_s)
            router.on_snapshot(other, snapshot(half_seconds), now_s)
            assert router.on_tick(now_s) == []

    @pytest.mark.parametrize("sends_snapshots", [False, True])
    def test_an_engine_that_lives_may_hang_all_the_same(self, sends_snapshots):
        """Its core answers between two steps, and one of them does not end."""
        router = make_router(2, engine=ALIVE, hang_s=4.0)
        [first] = router.on_arrival(req("a"), 0.0)
        hung, other = first.replica_id, {"r0": "r1", "r1": "r0"}[first.replica_id]
        report = {"last_booking": 1, "num_inflight_reqs": 1}
        router.on_snapshot(hung, busy(1, **report), 0.1)
        decisions, now_s = [], 0.0
        while not decisions:
            now_s += 0.5
            router.on_alive(hung, 7, 1, now_s)
            router.on_snapshot(other, snapshot(int(2 * now_s)), now_s)
            if sends_snapshots:
                router.on_snapshot(hung, busy(1 + int(2 * now_s), **report), now_s)
            decisions = router.on_tick(now_s)
        assert decisions == [Evacuate(hung, "hung")]
        assert 4.0 <= now_s <= 5.0

    def test_a_core_that_falls_silent_too_is_left(self):
        router = make_router(2, engine=ALIVE, stale_s=3.0)
        [first] = router.on_arrival(req("a"), 0.0)
        other = {"r0": "r1", "r1": "r0"}[first.replica_id]
        router.on_alive(first.replica_id, 1, 1, 2.0)
        for second in range(1, 6):
            router.on_snapshot(other, snapshot(second), float(second))
            assert router.on_tick(float(second)) == []
        router.on_snapshot(other, snapshot(6), 5.1)
        assert router.on_tick(5.3) == [Evacuate(first.replica_id, "stale")]

    def test_first_tokens_that_a_mute_engine_kept_to_itself_are_not_slow(self):
        router = make_router(3, engine=ALIVE, breaker={"min_calls": 2})
        placed = [router.on_arrival(req(f"a{number}"), 0.0)[0] for number in range(9)]
        mute, late = placed[0].replica_id, []
        for half_seconds in range(1, 12):
            now_s = half_seconds / 2
            router.on_alive(mute, half_seconds, 3, now_s)
            for replica_id in {"r0", "r1", "r2"} - {mute}:
                router.on_snapshot(replica_id, snapshot(half_seconds), now_s)
        for dispatch in placed:
            if dispatch.replica_id == mute:
                late.append(dispatch.request_id)
                router.on_first_token(dispatch.request_id, 6.0)
        assert len(late) >= 2
        assert router.state(6.0).breaker_events == []

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
