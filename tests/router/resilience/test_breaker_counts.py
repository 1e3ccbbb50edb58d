"""What does a breaker count, what does it forget, and what does it write down? To the last one."""

import random

import pytest

from router.resilience.breaker import (
    Breaker,
    BreakerEvent,
    BreakerLog,
    BreakerState,
    Failure,
    TripReason,
)
from router.resilience.settings import BreakerSettings

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN


def make_breaker(**settings: float) -> Breaker:
    """A closed breaker that no few failures in a row open; a cooldown of 1 s, no slow start."""
    defaults = {"cooldown_jitter": 0.0, "slow_start_s": 0.0, "max_consecutive_failures": 99}
    return Breaker(BreakerSettings(**defaults | settings), random.Random(0), 0.0, name="b")


def call(breaker: Breaker, verdicts: str, now_s: float = 0.0) -> None:
    """One call for each letter: g(ood), f(ailed), s(low)."""
    for verdict in verdicts:
        assert breaker.status is CLOSED
        permit = breaker.begin_call(now_s)
        if verdict == "f":
            breaker.record_failure(permit, Failure.ERROR, now_s)
        else:
            if verdict == "s":
                breaker.record_slow(permit, now_s)
            breaker.record_success(permit, now_s)


def reopen(breaker: Breaker) -> None:
    """Open it, and close it by a probe that succeeds."""
    breaker.trip(TripReason.LOST, 0.0)
    breaker.tick(1.0)
    breaker.record_success(breaker.begin_call(1.0), 1.0)
    assert breaker.status is CLOSED


class TestShares:
    @pytest.mark.parametrize(
        ("before", "last", "reason"),
        [
            ("gfg", "f", TripReason.FAILURE_SHARE),  # half of them is enough
            ("gggff", "f", TripReason.FAILURE_SHARE),
            ("ggggff", "ff", TripReason.FAILURE_SHARE),
            ("ggsss", "sss", TripReason.SLOW_SHARE),  # six of eight
        ],
    )
    def test_so_many_open_it_and_not_one_less(self, before, last, reason):
        breaker = make_breaker(min_calls=4, max_failure_share=0.5, max_slow_share=0.75)
        call(breaker, before + last)
        assert (breaker.status, breaker.reason) == (OPEN, reason)

    @pytest.mark.parametrize("verdicts", ["gggf", "ggfgfg", "ggggff", "gggs", "ggss", "gss"])
    def test_fewer_do_not(self, verdicts):
        breaker = make_breaker(min_calls=4, max_failure_share=0.5, max_slow_share=0.75)
        call(breaker, verdicts)
        assert breaker.status is CLOSED

    def test_the_window_holds_the_last_calls(self):
        breaker = make_breaker(min_calls=4, window_calls=4, max_failure_share=0.75)
        call(breaker, "ffgg" + "gg" + "ff")
        assert breaker.status is CLOSED
        call(breaker, "f")
        assert breaker.status is OPEN

    def test_what_is_as_old_as_the_window_still_counts(self):
        breaker = make_breaker(min_calls=4, window_s=10.0, max_failure_share=0.5)
        call(breaker, "ff", 0.0)
        call(breaker, "gg", 10.0)
        assert breaker.status is OPEN

    def test_what_is_older_does_not(self):
        breaker = make_breaker(min_calls=3, window_s=10.0, max_failure_share=0.5)
        call(breaker, "ff", 0.0)
        call(breaker, "gggf", 10.1)
        assert breaker.status is CLOSED


class TestInARow:
    def test_an_opening_forgets_them(self):
        breaker = make_breaker(max_consecutive_failures=2)
        call(breaker, "f")
        reopen(breaker)
        call(breaker, "f")
        assert breaker.status is CLOSED
        call(breaker, "f")
        assert breaker.status is OPEN

    def test_a_call_from_before_it_opened_does_not_end_a_row(self):
        breaker = make_breaker(max_consecutive_failures=2)
        old = breaker.begin_call(0.0)
        reopen(breaker)
        call(breaker, "f")
        breaker.record_success(old, 1.0)
        call(breaker, "f")
        assert breaker.status is OPEN

    def test_nor_does_one_that_has_ended(self):
        breaker = make_breaker(max_consecutive_failures=2)
        permit = breaker.begin_call(0.0)
        breaker.record_success(permit, 0.0)
        call(breaker, "f")
        breaker.record_success(permit, 0.0)
        call(breaker, "f")
        assert breaker.status is OPEN


class TestLateFailures:
    def end(self, breaker: Breaker, now_s: float = 0.0) -> int:
        """A call that ended, and nobody knows yet whose fault it was."""
        permit = breaker.begin_call(now_s)
        breaker.release_permit(permit)
        return permit

    @pytest.mark.parametrize(
        ("failure", "reason"),
        [
            (Failure.ERROR, TripReason.CONSECUTIVE_FAILURES),
            (Failure.TIMEOUT, TripReason.CONSECUTIVE_TIMEOUTS),
        ],
    )
    def test_count_as_the_others(self, failure, reason):
        breaker = make_breaker(max_consecutive_failures=3, max_consecutive_timeouts=3)
        permits = [self.end(breaker) for _ in range(3)]
        for permit in permits:
            assert breaker.status is CLOSED
            breaker.record_late_failure(permit, failure, 5.0)
        assert (breaker.status, breaker.reason) == (OPEN, reason)
        assert breaker.state(5.0).next_probe_in_s == 1.0

    def test_are_dated_when_they_show(self):
        breaker = make_breaker(min_calls=2, window_s=10.0)
        permit = self.end(breaker)
        breaker.record_late_failure(permit, Failure.ERROR, 9.0)
        call(breaker, "g", 15.0)
        assert breaker.status is OPEN

    def test_do_not_count_from_before_it_opened(self):
        breaker = make_breaker(max_consecutive_failures=1)
        permit = self.end(breaker)
        reopen(breaker)
        breaker.record_late_failure(permit, Failure.ERROR, 1.0)
        assert breaker.status is CLOSED
        breaker.record_late_failure(self.end(breaker), Failure.ERROR, 1.0)  # the first since
        assert breaker.status is OPEN

    def test_do_not_count_while_it_is_not_closed(self):
        breaker = make_breaker(max_consecutive_failures=1)
        breaker.trip(TripReason.LOST, 0.0)
        breaker.tick(1.0)
        breaker.record_late_failure(self.end(breaker, 1.0), Failure.ERROR, 1.0)
        assert breaker.status is HALF_OPEN
        assert breaker.state(1.0).num_opened == 1


class TestWhatIsShown:
    def test_the_log_names_what_happened_when_and_why(self):
        log = BreakerLog()
        settings = BreakerSettings(cooldown_jitter=0.0)
        breaker = Breaker(settings, random.Random(0), 0.0, name="b", log=log)
        breaker.trip(TripReason.STALE, 1.0)
        breaker.tick(2.5)
        breaker.record_success(breaker.begin_call(3.0), 4.0)
        assert list(log) == [
            BreakerEvent(1.0, "b", "open", "stale"),
            BreakerEvent(2.5, "b", "half_open", ""),
            BreakerEvent(3.0, "b", "probe", ""),
            BreakerEvent(4.0, "b", "closed", ""),
        ]

    def test_without_a_name_and_a_log(self):
        log = BreakerLog()
        Breaker(BreakerSettings(), random.Random(0), 0.0, log=log).trip(TripReason.LOST, 0.0)
        assert log[0].breaker == ""
        breaker = Breaker(BreakerSettings(), random.Random(0), 0.0)
        assert breaker.is_steady
        breaker.trip(TripReason.LOST, 0.0)
        assert not breaker._log  # nobody reads it: it must not grow

    def test_the_name_is_in_the_error_of_who_does_not_ask_first(self):
        breaker = make_breaker()
        breaker.trip(TripReason.LOST, 0.0)
        with pytest.raises(ValueError, match="breaker b is open"):
            breaker.begin_call(0.0)

    def test_the_state_tells_what_holds_in_it(self):
        breaker = make_breaker()
        breaker.trip(TripReason.STALE, 0.0)
        breaker.trip(TripReason.HUNG, 0.5)
        state = breaker.state(1.0)
        assert (state.state, state.reason, state.share) == (OPEN, TripReason.HUNG, 0.0)
        assert (state.next_probe_in_s, state.num_opened) == (0.5, 1)
        breaker.tick(1.5)
        state = breaker.state(1.5)
        assert (state.state, state.share, state.next_probe_in_s) == (HALF_OPEN, 0.0, None)
        breaker.record_success(breaker.begin_call(1.5), 1.5)
        state = breaker.state(1.5)
        assert (state.state, state.reason, state.share) == (CLOSED, None, 1.0)
        assert (state.next_probe_in_s, state.num_opened) == (None, 0)
        assert breaker.is_steady


class TestSlowStart:
    @pytest.mark.parametrize(("slow_start_s", "share"), [(0.0, 1.0), (0.5, 0.1)])
    def test_is_off_or_short(self, slow_start_s, share):
        settings = BreakerSettings(slow_start_s=slow_start_s, cooldown_jitter=0.0)
        new = Breaker(settings, random.Random(0), 0.0, slow_start=True)
        assert new.share == share
        breaker = make_breaker(slow_start_s=slow_start_s)
        reopen(breaker)
        assert breaker.share == share

    def test_ends_at_all_of_the_traffic(self):
        breaker = make_breaker(slow_start_s=2.0)
        reopen(breaker)
        breaker.tick(50.0)
        assert breaker.share == 1.0

    def test_what_has_ended_bounds_nothing(self):
        breaker = make_breaker()
        for _ in range(3):
            breaker.begin_call(0.0)
        assert breaker.admits(max_calls=1)


def test_as_slow_as_may_be_is_not_slow():
    settings = BreakerSettings(slow_factor=5.0, slow_floor_s=2.0)
    assert not settings.is_slow(2.0, predicted_s=0.01)
    assert not settings.is_slow(10.0, predicted_s=2.0)
