import random

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from router.resilience.breaker import Breaker, BreakerLog, BreakerState, Failure, TripReason
from router.resilience.settings import BreakerSettings
from tests.support.builders import after_json

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN


def make_breaker(now_s: float = 0.0, **settings: float) -> Breaker:
    """A closed breaker; cooldowns of 1 s, 2 s, 4 s, …, without jitter."""
    defaults = {"cooldown_jitter": 0.0}
    return Breaker(BreakerSettings(**defaults | settings), random.Random(0), now_s, name="b")


def fail(breaker: Breaker, times: int = 1, failure: Failure = Failure.ERROR) -> None:
    for _ in range(times):
        breaker.record_failure(breaker.begin_call(0.0), failure, 0.0)


def succeed(breaker: Breaker, times: int = 1) -> None:
    for _ in range(times):
        breaker.record_success(breaker.begin_call(0.0), 0.0)


def reason(breaker: Breaker) -> TripReason | None:
    return breaker.state(0.0).reason


class TestOpens:
    def test_failures_in_a_row(self):
        breaker = make_breaker(max_consecutive_failures=3)
        fail(breaker, 2)
        succeed(breaker)
        fail(breaker, 2)
        assert breaker.status is CLOSED
        fail(breaker)
        assert (breaker.status, reason(breaker)) == (OPEN, TripReason.CONSECUTIVE_FAILURES)
        assert not breaker.admits()

    def test_fewer_timeouts_in_a_row(self):
        breaker = make_breaker(max_consecutive_timeouts=2)
        fail(breaker, 1, Failure.TIMEOUT)
        fail(breaker)
        fail(breaker, 1, Failure.TIMEOUT)
        assert breaker.status is CLOSED
        fail(breaker, 1, Failure.TIMEOUT)
        assert (breaker.status, reason(breaker)) == (OPEN, TripReason.CONSECUTIVE_TIMEOUTS)

    def test_share_of_failures_among_enough_calls(self):
        breaker = make_breaker(min_calls=6, max_failure_share=0.5, max_consecutive_failures=9)
        for _ in range(2):
            fail(breaker)
            succeed(breaker)
        fail(breaker)
        assert breaker.status is CLOSED
        fail(breaker)
        assert (breaker.status, reason(breaker)) == (OPEN, TripReason.FAILURE_SHARE)

    def test_old_failures_are_forgotten(self):
        breaker = make_breaker(min_calls=4, max_consecutive_failures=9, window_s=10.0)
        fail(breaker, 3)
        breaker.record_success(breaker.begin_call(11.0), 11.0)
        breaker.record_failure(breaker.begin_call(11.0), Failure.ERROR, 11.0)
        assert breaker.status is CLOSED

    def test_share_of_slow_calls(self):
        breaker = make_breaker(min_calls=5, max_slow_share=0.8)
        succeed(breaker)
        for _ in range(4):
            assert breaker.status is CLOSED
            permit = breaker.begin_call(0.0)
            breaker.record_slow(permit, 0.0)
            breaker.record_slow(permit, 0.0)
            breaker.record_success(permit, 0.0)  # in the end
        assert (breaker.status, reason(breaker)) == (OPEN, TripReason.SLOW_SHARE)

    @pytest.mark.parametrize("trip", list(TripReason))
    def test_at_once_for_what_no_call_tells(self, trip):
        breaker = make_breaker()
        breaker.trip(trip, 0.0)
        assert (breaker.status, reason(breaker)) == (OPEN, trip)

    def test_never_for_client_errors(self):
        breaker = make_breaker(max_consecutive_failures=1, min_calls=1)
        for _ in range(100):
            breaker.release_permit(breaker.begin_call(0.0))
        assert breaker.status is CLOSED
        assert breaker.state(0.0).num_open_calls == 0


class TestProbes:
    def test_one_after_the_cooldown(self):
        breaker = make_breaker()
        breaker.trip(TripReason.LOST, 10.0)
        breaker.tick(10.9)
        assert breaker.status is OPEN
        assert breaker.state(10.4).next_probe_in_s == pytest.approx(0.6)
        breaker.tick(11.0)
        assert breaker.status is HALF_OPEN
        breaker.begin_call(11.0)
        assert not breaker.admits()
        with pytest.raises(ValueError, match="half_open"):
            breaker.begin_call(11.0)

    def test_success_closes_it_and_traffic_grows(self):
        breaker = make_breaker(slow_start_s=10.0)
        breaker.trip(TripReason.LOST, 0.0)
        breaker.tick(1.0)
        breaker.record_success(breaker.begin_call(1.0), 2.0)
        assert breaker.status is CLOSED
        assert breaker.admits(8)
        breaker.begin_call(2.0)
        assert not breaker.admits(8)  # a tenth, but always one
        breaker.tick(7.0)
        assert breaker.share == pytest.approx(0.55)
        assert breaker.admits(8)
        assert not breaker.is_steady
        breaker.tick(12.0)
        assert breaker.is_steady

    @pytest.mark.parametrize("verdict", ["fail", "slow"])
    def test_failure_opens_it_for_longer(self, verdict):
        breaker = make_breaker(max_cooldown_s=4.0)
        breaker.trip(TripReason.LOST, 0.0)
        now_s, waits_s = 0.0, []
        for _ in range(4):
            wait_s = breaker.state(now_s).next_probe_in_s
            waits_s.append(wait_s)
            now_s += wait_s
            breaker.tick(now_s)
            permit = breaker.begin_call(now_s)
            if verdict == "fail":
                breaker.record_failure(permit, Failure.ERROR, now_s)
            else:
                breaker.record_slow(permit, now_s)
            ends = {"fail": TripReason.PROBE_FAILED, "slow": TripReason.PROBE_SLOW}
            assert reason(breaker) is ends[verdict]
        assert waits_s == [1.0, 2.0, 4.0, 4.0]

    def test_a_relapse_during_slow_start_is_a_failed_recovery(self):
        breaker = make_breaker(slow_start_s=10.0)
        breaker.trip(TripReason.LOST, 0.0)
        breaker.tick(1.0)
        breaker.record_success(breaker.begin_call(1.0), 1.0)
        breaker.trip(TripReason.LOST, 2.0)
        assert breaker.state(2.0).next_probe_in_s == 2.0
        breaker.tick(4.0)
        breaker.record_success(breaker.begin_call(4.0), 4.0)
        breaker.tick(14.0)
        breaker.trip(TripReason.LOST, 20.0)
        assert breaker.state(20.0).next_probe_in_s == 1.0

    def test_without_a_verdict_the_next_call_probes(self):
        breaker = make_breaker()
        breaker.trip(TripReason.LOST, 0.0)
        breaker.tick(1.0)
        breaker.release_permit(breaker.begin_call(1.0))
        assert breaker.status is HALF_OPEN
        assert breaker.admits()

    def test_what_is_still_wrong_puts_the_probe_off(self):
        breaker = make_breaker()
        breaker.trip(TripReason.STALE, 0.0)
        breaker.trip(TripReason.STALE, 0.9)
        breaker.tick(1.8)
        assert breaker.status is OPEN
        breaker.tick(1.9)
        assert breaker.status is HALF_OPEN

    def test_jitter_only_lengthens(self):
        rng = random.Random(1)
        settings = BreakerSettings(cooldown_s=4.0, cooldown_jitter=0.5)
        waits_s = set()
        for _ in range(20):
            breaker = Breaker(settings, rng, 0.0)
            breaker.trip(TripReason.LOST, 0.0)
            waits_s.add(breaker.state(0.0).next_probe_in_s)
        assert 4.0 <= min(waits_s) < max(waits_s) <= 6.0

    def test_calls_from_before_do_not_count(self):
        breaker = make_breaker(max_consecutive_failures=1)
        old = breaker.begin_call(0.0)
        older = breaker.begin_call(0.0)
        breaker.trip(TripReason.LOST, 0.0)
        breaker.tick(1.0)
        breaker.record_success(old, 1.0)
        assert breaker.status is HALF_OPEN
        breaker.record_success(breaker.begin_call(1.0), 1.0)
        breaker.record_failure(older, Failure.ERROR, 1.0)
        assert breaker.status is CLOSED


def test_a_new_engine_starts_slowly():
    breaker = Breaker(BreakerSettings(), random.Random(0), 5.0, slow_start=True)
    assert breaker.status is CLOSED
    assert breaker.share == 0.1
    breaker.tick(15.0)
    assert breaker.share == 1.0


def test_slow_is_far_beyond_the_prediction_and_long():
    settings = BreakerSettings(slow_factor=5.0, slow_floor_s=2.0)
    assert not settings.is_slow(1.9, predicted_s=0.01)
    assert settings.is_slow(2.1, predicted_s=0.01)
    assert not settings.is_slow(9.0, predicted_s=2.0)
    assert settings.is_slow(10.1, predicted_s=2.0)


class Caller(RuleBasedStateMachine):
    """Whoever calls, in whatever order calls end: the log and the states tell one story."""

    @initialize(seed=st.integers(0, 99), slow_start_s=st.sampled_from([0.0, 5.0]))
    def start(self, seed, slow_start_s):
        self.now_s = 0.0
        self.log = BreakerLog(maxlen=10_000)
        self.settings = BreakerSettings(
            max_consecutive_failures=3,
            min_calls=4,
            window_calls=8,
            cooldown_s=1.0,
            max_cooldown_s=8.0,
            slow_start_s=slow_start_s,
        )
        self.breaker = Breaker(self.settings, random.Random(seed), 0.0, name="b", log=self.log)
        self.permits: dict[int, int] = {}  # open calls: how often it had opened before
        self.probe: int | None = None
        self.num_opened = 0

    def watch(self) -> None:
        """Count how often it has opened; a probe is over when the state moves."""
        num_opened = sum(event.event == "open" for event in self.log)
        if num_opened != self.num_opened or self.breaker.status is not HALF_OPEN:
            self.probe = None
        self.num_opened = num_opened

    @rule()
    def begin(self):
        admits = self.breaker.admits()
        if self.breaker.status is CLOSED:
            assert admits == (
                self.breaker.share == 1.0 or self.breaker.share * float("inf") > len(self.permits)
            )
        else:
            assert admits == (self.breaker.status is HALF_OPEN and self.probe is None)
        if admits:
            permit = self.breaker.begin_call(self.now_s)
            assert permit not in self.permits
            self.permits[permit] = self.num_opened
            if self.breaker.status is HALF_OPEN:
                self.probe = permit

    @precondition(lambda self: self.permits)
    @rule(index=st.integers(0, 99), end=st.sampled_from(["ok", "ok", "error", "timeout", "left"]))
    def end(self, index, end):
        permit = list(self.permits)[index % len(self.permits)]
        is_stale = self.permits.pop(permit) != self.num_opened
        before = self.breaker.status
        was_probe = permit == self.probe
        if end == "ok":
            self.breaker.record_success(permit, self.now_s)
        elif end == "left":
            self.breaker.release_permit(permit)
        else:
            self.breaker.record_failure(permit, Failure(end), self.now_s)
        if was_probe:
            expected = {"ok": CLOSED, "left": HALF_OPEN}.get(end, OPEN)
            assert self.breaker.status is expected
            self.probe = None
        elif is_stale or end in ("ok", "left") or before is not CLOSED:
            # A good call can still leave the share of bad ones too high, once there are enough.
            assert self.breaker.status is before or (end == "ok" and not is_stale)
        self.watch()

    @precondition(lambda self: self.permits)
    @rule(index=st.integers(0, 99))
    def stall(self, index):
        permit = list(self.permits)[index % len(self.permits)]
        self.breaker.record_slow(permit, self.now_s)
        if permit == self.probe:
            assert self.breaker.status is OPEN
        self.watch()

    @rule(permit=st.integers(-1, 3))
    def end_again(self, permit):
        if permit not in self.permits:
            before = self.breaker.state(self.now_s)
            self.breaker.record_success(permit, self.now_s)
            self.breaker.record_failure(permit, Failure.ERROR, self.now_s)
            self.breaker.release_permit(permit)
            self.breaker.record_slow(permit, self.now_s)
            assert self.breaker.state(self.now_s) == before

    @rule(reason=st.sampled_from([TripReason.LOST, TripReason.STALE, TripReason.HUNG]))
    def trip(self, reason):
        self.breaker.trip(reason, self.now_s)
        assert self.breaker.status is OPEN
        assert not self.breaker.admits()
        self.watch()

    @rule(seconds=st.sampled_from([0.0, 0.5, 2.0, 20.0, -1.0]))
    def tick(self, seconds):
        self.now_s += seconds
        share = self.breaker.share
        self.breaker.tick(self.now_s)
        assert self.breaker.share >= share
        self.watch()

    @invariant()
    def every_call_is_counted(self):
        state = after_json(self.breaker.state(self.now_s))
        assert state.num_open_calls == len(self.permits)

    @invariant()
    def the_log_is_a_path_through_the_table(self):
        after = {
            "closed": {"open"},
            "open": {"half_open"},
            "half_open": {"probe", "open"},
            "probe": {"probe", "closed", "open"},
        }
        status, opened_s = "closed", 0.0
        for event in self.log:
            assert event.event in after[status], list(self.log)
            if event.event == "open":
                opened_s = event.at_s
            elif event.event == "half_open":
                assert event.at_s >= opened_s + self.settings.cooldown_s
            status = event.event
        assert self.breaker.status.value == {"probe": "half_open"}.get(status, status)


Caller.TestCase.settings = hypothesis_settings(
    max_examples=200, stateful_step_count=50, deadline=None, print_blob=True, database=None
)


@pytest.mark.timeout(600)
class TestCaller(Caller.TestCase):
    pass
