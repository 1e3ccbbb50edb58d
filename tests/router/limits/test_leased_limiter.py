"""A gateway's part of the limits, by itself: what it asks for, tells, and may send, and when."""

import math

import pytest

from router.limits.lease import LEASE_S, LeasedLimiter, LeaseEvent, LeaseGrant, LeaseUpdate
from router.limits.rate_limit import Amount, RateLimiter, RateReport
from router.limits.settings import RateLimits

ONE, NOTHING = Amount(1, 10), Amount()
STATE = RateLimiter(RateLimits(rpm=7)).state(0.0)


def granted(amount: Amount, now_s: float = 0.0, **limits: float) -> LeasedLimiter:
    """A limiter that was granted so much at this time."""
    limiter = LeasedLimiter(RateLimits(**limits))
    limiter.note_waiting("asks", amount)
    update = limiter.make_update(now_s)
    limiter.on_grant(LeaseGrant(number=update.number, granted=amount, state=STATE), now_s)
    return limiter


def answer(limiter: LeasedLimiter, update: LeaseUpdate, now_s: float, **grant) -> None:
    limiter.on_grant(LeaseGrant(number=update.number, state=STATE, **grant), now_s)


class TestWaits:
    def test_before_the_first_grant_for_one_more_look(self):
        assert LeasedLimiter(RateLimits(rpm=9)).wait_s(ONE, 3.0) == 0.002

    @pytest.mark.parametrize(
        ("limits", "most"),
        [
            ({"tpm": 50}, Amount(1, 50)),
            ({"max_cost_per_hour": 2.0, "max_cost_per_day": 9.0}, Amount(1, 0, 2.0)),
            ({"max_cost_per_day": 3.0, "max_cost_per_hour": 9.0}, Amount(1, 0, 3.0)),
        ],
    )
    def test_for_ever_for_more_than_a_limit(self, limits, most):
        limiter = LeasedLimiter(RateLimits(**limits))
        assert limiter.wait_s(most, 0.0) == 0.002
        more = most + Amount(0, 1) if most.num_tokens else most + Amount(cost=0.1)
        assert limiter.wait_s(more, 0.0) == math.inf

    def test_go_by_the_limits_of_today(self):
        limiter = LeasedLimiter(RateLimits())
        limiter.use_limits(RateLimits(tpm=5))
        assert limiter.wait_s(ONE, 0.0) == math.inf

    def test_as_long_as_the_grant_says(self):
        limiter = LeasedLimiter(RateLimits())
        limiter.note_waiting("a", ONE)
        answer(limiter, limiter.make_update(1.0), 2.0, wait_s=5.0)
        assert limiter.wait_s(ONE, 3.0) == 4.0
        assert limiter.wait_s(ONE, 8.0) == 0.002
        # An answer to an update that asked for nothing tells nothing.
        answer(limiter, limiter.make_update(3.0), 3.0)
        assert limiter.wait_s(ONE, 3.0) == 4.0

    def test_not_at_all_while_the_lease_covers_it(self):
        limiter = granted(Amount(2, 20), 1.0)
        assert limiter.wait_s(Amount(2, 20), 1.0 + LEASE_S - 0.01) == 0.0
        assert limiter.wait_s(Amount(3, 20), 1.0) == 0.002
        assert limiter.wait_s(Amount(2, 20), 1.0 + LEASE_S) > 0.0


class TestReserves:
    def test_out_of_what_was_granted(self):
        limiter = granted(Amount(2, 20))
        limiter.reserve("a", ONE, 0.0)
        assert limiter.make_update(0.1).left == ONE
        with pytest.raises(ValueError, match="request a has a reservation already"):
            limiter.reserve("a", ONE, 0.0)
        with pytest.raises(ValueError, match="no room for request b"):
            limiter.reserve("b", Amount(2, 10), 0.0)
        limiter.reserve("b", ONE, LEASE_S - 0.01)

    def test_nothing_before_a_grant(self):
        limiter = LeasedLimiter(RateLimits())
        for amount in (NOTHING, ONE):
            assert limiter.wait_s(amount, 0.0) > 0.0
            with pytest.raises(ValueError, match="no room for request a"):
                limiter.reserve("a", amount, 0.0)

    def test_nothing_after_the_lease(self):
        limiter = granted(Amount(2, 20))
        with pytest.raises(ValueError, match="no room for request a"):
            limiter.reserve("a", ONE, LEASE_S)

    def test_who_is_sent_waits_no_more(self):
        limiter = granted(Amount(2, 20))
        limiter.note_waiting("a", ONE)
        limiter.note_waiting("b", Amount(1, 7))
        limiter.reserve("a", ONE, 0.0)
        limiter.reserve("never noted", ONE, 0.0)
        assert limiter.make_update(0.1).waiting == [Amount(1, 7)]


class TestTells:
    def test_what_became_of_requests_and_how_long_ago(self):
        limiter = granted(Amount(3, 30))
        report = RateReport(limit_requests=5)
        for name in "abc":
            limiter.reserve(name, ONE, 0.1)
        limiter.mark_counted("a", 0.2)
        limiter.end_reservation("a", Amount(1, 4), 0.3)
        limiter.record_report(report, 0.3)
        limiter.record_refusal("b", report, 0.4)
        limiter.end_reservation("c", None, 0.4)
        for nobody in ("a", "b", "z"):  # ended, refused, never sent
            limiter.mark_counted(nobody, 0.5)
            limiter.end_reservation(nobody, ONE, 0.5)
        limiter.record_refusal("z", report, 0.5)
        told = [
            (event.kind, event.request_id, round(1.0 - event.age_s, 3), event.amount, event.report)
            for event in limiter.make_update(1.0).events
        ]
        assert told == [
            ("sent", "a", 0.1, ONE, None),
            ("sent", "b", 0.1, ONE, None),
            ("sent", "c", 0.1, ONE, None),
            ("counted", "a", 0.2, None, None),
            ("ended", "a", 0.3, Amount(1, 4), None),
            ("report", "", 0.3, None, report),
            ("refused", "b", 0.4, None, report),
            ("ended", "c", 0.4, None, None),
        ]

    def test_everything_once_in_updates_that_count_up(self):
        limiter = granted(ONE)
        limiter.reserve("a", ONE, 0.0)
        limiter.note_waiting("b", ONE)
        update = limiter.make_update(0.0)
        assert update == LeaseUpdate(
            number=2, events=[LeaseEvent("sent", "a", 0.0, ONE)], waiting=[ONE]
        )
        answer(limiter, update, 0.0)
        assert limiter.make_update(0.0) == LeaseUpdate(number=3)

    def test_of_those_that_wait_the_first_32(self):
        limiter = LeasedLimiter(RateLimits())
        for number in range(40):
            limiter.note_waiting(f"q{number}", Amount(1, number))
        waiting = limiter.make_update(0.0).waiting
        assert [each.num_tokens for each in waiting] == list(range(32))

    def test_the_same_again_until_it_is_answered(self):
        limiter = LeasedLimiter(RateLimits())
        limiter.note_waiting("a", ONE)
        update = limiter.make_update(0.0)
        assert limiter.next_update_s() is None
        limiter.on_no_answer()
        assert limiter.next_update_s() == 1.0
        limiter.note_waiting("b", ONE)
        assert limiter.make_update(1.2) == update
        assert limiter.next_update_s() is None
        limiter.on_no_answer()
        assert limiter.next_update_s() == 2.2
        answer(limiter, update, 1.5, granted=ONE)
        assert limiter.wait_s(ONE, LEASE_S - 0.01) == 0.0  # it counts from the first sending
        assert limiter.wait_s(ONE, LEASE_S) > 0.0
        assert limiter.make_update(2.0) == LeaseUpdate(number=2)  # who waits is noted again


class TestAsksAgain:
    def test_when_something_waits_and_there_may_be_room(self):
        limiter = LeasedLimiter(RateLimits())
        assert limiter.next_update_s() is None
        limiter.note_waiting("a", ONE)
        assert limiter.next_update_s() == -math.inf
        answer(limiter, limiter.make_update(0.0), 0.0, wait_s=3.0)
        limiter.note_waiting("a", ONE)
        assert limiter.next_update_s() == 3.0

    def test_soon_after_something_has_happened(self):
        limiter = LeasedLimiter(RateLimits())
        limiter.record_report(RateReport(), 2.0)
        limiter.record_report(RateReport(), 2.04)
        assert limiter.next_update_s() == 2.05

    def test_every_second_while_it_has_or_is_anything(self):
        limiter = granted(ONE)
        assert limiter.next_update_s() == 1.0
        limiter.reserve("a", ONE, 0.0)
        answer(limiter, limiter.make_update(0.2), 0.2)
        assert limiter.next_update_s() == 1.2
        limiter.end_reservation("a", None, 0.3)
        answer(limiter, limiter.make_update(0.4), 0.4)
        assert limiter.next_update_s() is None

    @pytest.mark.parametrize(("waited_s", "left"), [(0.49, ONE), (0.5, NOTHING)])
    def test_what_nobody_used_is_given_back(self, waited_s, left):
        limiter = granted(ONE, 1.0)
        update = limiter.make_update(1.0 + waited_s)
        assert update.left == left
        assert limiter.wait_s(ONE, 1.0 + waited_s) == (0.0 if left == ONE else 0.002)

    def test_what_is_left_of_a_lease_that_ran_out_is_given_back(self):
        limiter = LeasedLimiter(RateLimits())
        limiter.note_waiting("a", ONE)
        answer(limiter, limiter.make_update(0.0), LEASE_S - 0.1, granted=ONE)
        assert limiter.make_update(LEASE_S).left == NOTHING


class TestGrants:
    def test_of_other_updates_are_ignored(self):
        limiter = LeasedLimiter(RateLimits())
        answer(limiter, LeaseUpdate(number=1), 0.0, granted=ONE)  # nothing was asked
        limiter.note_waiting("a", ONE)
        update = limiter.make_update(0.0)
        answer(limiter, LeaseUpdate(number=2), 0.0, granted=ONE)
        assert limiter.wait_s(ONE, 0.0) > 0.0
        answer(limiter, update, 0.0, granted=ONE)
        answer(limiter, update, 0.0, granted=ONE)  # twice
        assert limiter.state(0.0).leased == 1

    def test_that_come_too_late_are_not_used(self):
        limiter = LeasedLimiter(RateLimits())
        limiter.note_waiting("a", ONE)
        answer(limiter, limiter.make_update(0.0), LEASE_S, granted=ONE)
        assert limiter.make_update(LEASE_S + 0.1).left == NOTHING

    def test_add_up(self):
        limiter = granted(ONE)
        limiter.note_waiting("b", Amount(2, 5))
        answer(limiter, limiter.make_update(0.1), 0.2, granted=Amount(2, 5))
        assert limiter.make_update(0.3).left == Amount(3, 15)


class TestRefusals:
    @pytest.mark.parametrize(("retry_after_s", "until_s"), [(7.0, 7.5), (None, 3.0), (1.0, 3.0)])
    def test_drop_the_lease_and_wait_for_the_longest(self, retry_after_s, until_s):
        limiter = LeasedLimiter(RateLimits())
        limiter.note_waiting("a", ONE)
        answer(limiter, limiter.make_update(0.0), 0.0, granted=Amount(2, 20), wait_s=3.0)
        limiter.reserve("a", ONE, 0.1)
        limiter.record_refusal("a", RateReport(retry_after_s=retry_after_s), 0.5)
        assert limiter.wait_s(ONE, 1.0) == until_s - 1.0
        assert limiter.state(1.0).leased == 0

    def test_without_a_word_of_when_are_over_at_once(self):
        limiter = granted(Amount(2, 20))
        limiter.reserve("a", ONE, 0.1)
        limiter.record_refusal("a", RateReport(), 0.5)
        assert limiter.wait_s(ONE, 0.5) == 0.002


def test_the_state_is_the_servers_and_what_is_leased():
    limiter = LeasedLimiter(RateLimits(rpm=3))
    assert limiter.state(0.0).leased == 0
    assert limiter.state(0.0).requests.limit == 3
    limiter = granted(Amount(2, 20))
    assert limiter.state(LEASE_S - 0.1).leased == 2
    assert limiter.state(LEASE_S).leased == 0
    assert limiter.state(0.0).requests.limit == 7  # as the grant said
