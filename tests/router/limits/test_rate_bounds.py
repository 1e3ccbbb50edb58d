"""One key's limits to the last request: what has room, when, and what each end leaves behind."""

import math

import pytest

from router.limits.rate_limit import Amount, RateLimiter, RateReport
from router.limits.settings import RateLimits

STAYS_S = 60.06


def make_limiter(**limits) -> RateLimiter:
    return RateLimiter(RateLimits(**limits))


def one(num_tokens: int = 0, cost: float = 0.0) -> Amount:
    return Amount(1, num_tokens, cost)


def used(limiter: RateLimiter, now_s: float) -> tuple[float, float, float, float]:
    state = limiter.state(now_s)
    return (state.requests.used, state.tokens.used, state.cost_hour.used, state.cost_day.used)


def sent(limiter: RateLimiter, *names: str, at_s: float = 0.0, amount: Amount | None = None):
    """Requests that were sent and answered at this time."""
    for name in names:
        limiter.record_sent(name, amount or one(), at_s)
        limiter.mark_counted(name, at_s)


class TestAmounts:
    def test_cover_as_much_more_as_rounding_may_add(self):
        assert Amount().covers(Amount(cost=1e-9))

    def test_add_and_subtract(self):
        assert Amount(1, 2, 3.0) + Amount(10, 20, 30.0) == Amount(11, 22, 33.0)
        assert Amount(11, 22, 33.0) - Amount(10, 20, 30.0) == Amount(1, 2, 3.0)

    @pytest.mark.parametrize(
        ("other", "is_covered"),
        [
            (Amount(2, 20, 1.0), True),
            (Amount(2, 20, 1.0 + 1e-10), True),  # rounding
            (Amount(2, 20, 1.0 + 1e-8), False),
            (Amount(2, 20, 1.01), False),
            (Amount(3, 20, 1.0), False),
            (Amount(2, 21, 1.0), False),
            (Amount(), True),
        ],
    )
    def test_cover_what_is_no_larger_in_anything(self, other, is_covered):
        assert Amount(2, 20, 1.0).covers(other) == is_covered


class TestRoom:
    def test_of_each_window_by_itself(self):
        limits = {"rpm": 2, "tpm": 50, "max_cost_per_hour": 3.0, "max_cost_per_day": 4.0}
        limiter = make_limiter(**limits)
        sent(limiter, "a", amount=one(30, 2.0))
        state = limiter.state(0.0)
        shown = [
            (window.used, window.limit)
            for window in (state.requests, state.tokens, state.cost_hour, state.cost_day)
        ]
        assert shown == [(1, 2), (30, 50), (2.0, 3.0), (2.0, 4.0)]
        at_s = 40.0  # past all spacing
        for fits, tight in ((one(20, 1.0), one(21, 0.0)), (one(20, 1.0), one(0, 1.1))):
            assert limiter.wait_s(fits, at_s) == 0.0
            assert limiter.wait_s(tight, at_s) > 0.0
        assert limiter.wait_s(one(21), at_s) == pytest.approx(STAYS_S - at_s)
        assert limiter.wait_s(one(0, 1.5), at_s) == pytest.approx(3603.6 - at_s)
        assert limiter.wait_s(one(0, 3.0), at_s) == pytest.approx(86486.4 - at_s)
        assert limiter.wait_s(Amount(2), at_s) == pytest.approx(STAYS_S - at_s)
        assert limiter.wait_s(one(0, 4.5), at_s) == math.inf

    def test_without_any_limit(self):
        limiter = make_limiter()
        sent(limiter, *map(str, range(100)), amount=one(10**6, 1e6))
        assert limiter.wait_s(one(10**9, 1e9), 0.0) == 0.0
        state = limiter.state(0.0)
        assert (state.requests.limit, state.tokens.limit, state.cost_hour.limit) == (None,) * 3

    def test_of_requests_at_a_time(self):
        limiter = make_limiter(max_concurrency=3)
        assert limiter.wait_s(Amount(3), 0.0) == 0.0
        assert limiter.wait_s(Amount(4), 0.0) == math.inf
        sent(limiter, "a")
        limiter.record_sent("b", one(), 0.0)
        assert limiter.wait_s(one(), 0.0) == 0.0
        assert limiter.wait_s(Amount(2), 0.0) == 0.5  # one of two that take a second each
        limiter.set_leased("g", one(), 0.0)
        assert limiter.wait_s(one(), 0.0) == pytest.approx(1.0 / 3.0)
        limiter.set_leased("h", one(), 0.0)
        assert limiter.wait_s(one(), 0.0) == pytest.approx(1.0 / 4.0)
        limiter.set_leased("g", Amount(), 0.0)
        limiter.set_leased("h", Amount(), 0.0)
        assert limiter.wait_s(one(), 0.0) == 0.0

    def test_returns_as_soon_as_calls_usually_end(self):
        limiter = make_limiter(max_concurrency=1)
        for number in range(100):
            limiter.record_sent(str(number), one(), 10.0 * number)
            limiter.end_reservation(str(number), one(), 10.0 * number + 4.0)
        limiter.record_sent("a", one(), 2000.0)
        assert limiter.wait_s(one(), 2000.0) == pytest.approx(4.0, abs=0.05)
        limiter = make_limiter(max_concurrency=1)
        limiter.record_sent("a", one(), 0.0)
        limiter.end_reservation("a", one(), 21.0)  # a twentieth of twenty more than was guessed
        limiter.record_sent("b", one(), 30.0)
        assert limiter.wait_s(one(), 30.0) == pytest.approx(2.0)

    def test_as_large_as_a_limit_where_nothing_is_used(self):
        assert make_limiter(rpm=1, tpm=10).wait_s(one(10), 0.0) == 0.0


class TestSpacing:
    """From half of a limit on, each request pushes the next one back."""

    def test_not_up_to_the_half(self):
        limiter = make_limiter(rpm=10)
        for name in "abcde":
            limiter.reserve(name, one(), 0.0)
        assert limiter.wait_s(one(), 0.0) == 0.0

    def test_grows_with_what_is_used(self):
        limiter = make_limiter(rpm=10)
        now_s, waits_s = 0.0, []
        for number in range(10):
            limiter.reserve(str(number), one(), now_s)
            limiter.mark_counted(str(number), now_s)
            wait_s = limiter.wait_s(one(), now_s)
            waits_s.append(round(wait_s, 3))
            now_s += wait_s + 1e-9
        # A fifth of 6.006 s for each that is beyond the half; less than 0.05 s early.
        assert waits_s[:5] == [0, 0, 0, 0, 0]
        assert waits_s[5:8] == [1.151, 2.402, 3.604]
        assert waits_s[8] == 4.805

    def test_is_by_the_window_that_is_fullest(self):
        limiter = make_limiter(rpm=100, tpm=100)
        limiter.reserve("a", one(80), 0.0)
        assert limiter.wait_s(one(), 0.0) == pytest.approx(0.6 * STAYS_S * 0.8 - 0.05)

    def test_is_never_sparser_than_the_limit_itself(self):
        limiter = make_limiter(tpm=100)
        sent(limiter, "a", amount=one(150))  # beyond it
        limiter.set_leased("g", one(20), 0.0)
        limiter.mark_counted("a", 0.0)
        assert limiter._next_send_s == pytest.approx(STAYS_S * 0.2)

    def test_adds_up_from_the_last_gap_or_from_now(self):
        limiter = make_limiter(tpm=100)
        limiter.set_leased("g", one(75), 0.0)
        assert limiter._next_send_s == pytest.approx(0.5 * STAYS_S * 0.75)
        first_s = limiter._next_send_s
        limiter.set_leased("g", Amount(2, 75), 1.0)  # one more, of no tokens
        limiter.set_leased("g", Amount(2, 90), 1.0)  # none more
        limiter.set_leased("g", Amount(2, 75), 1.0)
        assert limiter._next_send_s == first_s
        limiter.set_leased("g", Amount(3, 76), 100.0)
        assert limiter._next_send_s == pytest.approx(100.0 + 0.52 * STAYS_S * 0.01)


class TestEnds:
    def test_count_what_was_counted_instead_of_what_was_reserved(self):
        limiter = make_limiter()
        limiter.record_sent("a", one(50, 2.0), 0.0)
        limiter.mark_counted("a", 1.0)
        limiter.end_reservation("a", one(20, 0.5), 5.0)
        assert used(limiter, 5.0) == (1, 20, 0.5, 0.5)
        assert used(limiter, 1.0 + STAYS_S - 0.01)[:2] == (1, 20)
        assert used(limiter, 1.0 + STAYS_S)[:2] == (0, 0)

    def test_count_from_the_end_where_no_answer_came_before(self):
        limiter = make_limiter()
        limiter.record_sent("a", one(50), 0.0)
        limiter.end_reservation("a", one(20), 4.0)
        assert used(limiter, 4.0)[:2] == (1, 20)
        assert used(limiter, 4.0 + STAYS_S - 0.01)[:2] == (1, 20)
        assert used(limiter, 4.0 + STAYS_S)[:2] == (0, 0)

    def test_leave_nothing_of_what_nobody_saw_and_all_of_what_nobody_counted(self):
        limiter = make_limiter()
        limiter.record_sent("unseen", one(50, 1.0), 0.0)
        limiter.end_reservation("unseen", None, 1.0)
        assert used(limiter, 1.0) == (0, 0, 0, 0)
        sent(limiter, "seen", at_s=1.0, amount=one(50, 1.0))
        limiter.end_reservation("seen", None, 2.0)
        assert used(limiter, 2.0) == (1, 50, 1.0, 1.0)

    def test_long_after_it_was_counted_count_what_it_took_more(self):
        limiter = make_limiter()
        sent(limiter, "a", amount=one(50))
        limiter.end_reservation("a", one(80), 100.0)
        assert used(limiter, 100.0 + STAYS_S - 0.01)[:2] == (0, 30)
        assert used(limiter, 100.0 + STAYS_S)[:2] == (0, 0)

    def test_of_unknown_ids_change_nothing(self):
        limiter = make_limiter(max_concurrency=1)
        limiter.end_reservation("nobody", one(50), 500.0)
        limiter.mark_counted("nobody", 500.0)
        assert used(limiter, 500.0) == (0, 0, 0, 0)
        limiter.record_sent("a", one(), 500.0)
        assert limiter.wait_s(one(), 500.0) == 1.0  # the usual call is as long as ever

    def test_free_the_id_and_not_before(self):
        limiter = make_limiter()
        sent(limiter, "a")
        with pytest.raises(ValueError, match="request a has a reservation already"):
            limiter.record_sent("a", one(), 0.0)
        limiter.end_reservation("a", None, 1.0)
        sent(limiter, "a")
        assert used(limiter, 1.0)[0] == 2

    def test_count_each_request_once(self):
        limiter = make_limiter()
        limiter.record_sent("a", one(5), 0.0)
        limiter.mark_counted("a", 1.0)
        limiter.mark_counted("a", 30.0)
        assert used(limiter, 1.0 + STAYS_S)[0] == 0

    def test_no_room_is_an_error_that_names_the_request(self):
        limiter = make_limiter(tpm=10)
        with pytest.raises(ValueError, match="no room for request a"):
            limiter.reserve("a", one(11), 0.0)
        assert limiter.state(0.0).num_open == 0


class TestUnanswered:
    def test_count_five_seconds_after_they_were_sent(self):
        limiter = make_limiter()
        for number in range(3):
            limiter.record_sent(str(number), one(), number)
        assert used(limiter, 7.0 + STAYS_S)[0] == 0
        for at_s, left in ((4.9, 3), (5.0 + STAYS_S - 0.01, 3), (5.0 + STAYS_S, 2), (66.1, 1)):
            limiter = make_limiter()
            for number in range(3):
                limiter.record_sent(str(number), one(), number)
            assert used(limiter, 5.0)[0] == 3
            assert used(limiter, at_s)[0] == left, at_s

    def test_are_in_flight_until_then(self):
        limiter = make_limiter(rpm=1)
        limiter.record_sent("a", one(), 0.0)
        assert limiter.wait_s(one(), 4.9) == pytest.approx(STAYS_S)
        assert limiter.wait_s(one(), 5.0) == pytest.approx(STAYS_S)
        assert limiter.wait_s(one(), 8.0) == pytest.approx(STAYS_S - 3.0)

    def test_do_not_hold_up_what_leaves(self):
        limiter = make_limiter()
        sent(limiter, "a")
        limiter.record_sent("b", one(), STAYS_S)
        assert used(limiter, STAYS_S)[0] == 1


class TestRefusals:
    def test_count_as_a_request_without_tokens(self):
        for answered in (False, True):
            limiter = make_limiter()
            limiter.record_sent("a", one(50, 1.0), 0.0)
            if answered:
                limiter.mark_counted("a", 0.0)
            limiter.record_refusal("a", RateReport(), 2.0)
            state = limiter.state(2.0)
            assert (state.num_open, state.num_refused) == (0, 1)
            tokens = 50 if answered else 0
            assert used(limiter, 2.0)[:2] == (2 if answered else 1, tokens)
        assert used(limiter, 2.0 + STAYS_S)[0] == 0

    def test_of_unknown_ids_only_pause(self):
        limiter = make_limiter(rpm=4)
        limiter.record_refusal("nobody", RateReport(retry_after_s=0.0), 0.0)
        state = limiter.state(0.0)
        assert (state.num_refused, state.paused_s, state.requests.used) == (1, 0.0, 0)
        assert state.requests.limit == 4

    def test_pause_no_shorter_than_before(self):
        limiter = make_limiter()
        limiter.pause_until(9.0)
        limiter.pause_until(5.0)
        limiter.record_refusal("a", RateReport(retry_after_s=2.0), 1.0)
        assert limiter.state(1.0).paused_s == 8.0
        assert limiter.wait_s(one(), 1.0) == 8.0
        assert limiter.state(10.0).paused_s == 0.0

    def test_even_a_short_pause_is_one(self):
        limiter = make_limiter()
        limiter.pause_until(0.5)
        with pytest.raises(ValueError, match="no room"):
            limiter.reserve("a", one(), 0.0)

    def test_pause_twice_as_long_each_time_whatever_the_others_said(self):
        limiter = make_limiter()
        limiter.record_refusal("a", RateReport(retry_after_s=0.5), 0.0)
        limiter.record_refusal("b", RateReport(), 10.0)
        assert limiter.state(10.0).paused_s == 2.0

    def test_believe_a_limit_that_they_tell(self):
        limiter = make_limiter(rpm=100, tpm=1000)
        sent(limiter, *map(str, range(50)))
        limiter.record_sent("a", one(), 0.0)
        report = RateReport(limit_requests=40, remaining_requests=0)
        limiter.record_refusal("a", report, 1.0)
        assert limiter.state(1.0).requests.limit == 40
        report = RateReport(limit_tokens=70, remaining_tokens=30)
        limiter.record_report(report, 1.0)
        assert limiter.state(1.0).tokens.limit == 70
        assert limiter.state(1.0).requests.limit == 40

    @pytest.mark.parametrize("told", ["limit_requests", "limit_tokens"])
    def test_half_of_what_a_report_needs_is_no_report(self, told):
        limiter = make_limiter(rpm=100, tpm=100)
        sent(limiter, *map(str, range(50)))
        limiter.record_sent("a", one(), 0.0)
        limiter.record_refusal("a", RateReport(**{told: 7}), 1.0)  # but not what remains
        assert limiter.state(1.0).requests.limit == 100
        remaining = told.replace("limit", "remaining")
        limiter.record_report(RateReport(**{remaining: 7}), 1.0)
        assert limiter.state(1.0).tokens.limit == 100

    @pytest.mark.parametrize(
        ("num_requests", "num_tokens", "limits"),
        [
            (50, 0, (35.0, 1000)),  # 0.7 of what went through
            (24, 0, (100, 1000)),  # so few: no limit of ours was it
            (25, 0, (17.5, 1000)),
            (50, 900, (100, 630.0)),  # the tokens are nearer
            (120, 0, (70.0, 1000)),  # never more than 0.7 of the limit
        ],
    )
    def test_that_tell_nothing_lower_the_limit_that_is_nearest(
        self, num_requests, num_tokens, limits
    ):
        limiter = make_limiter(rpm=100, tpm=1000)
        sent(limiter, "big", amount=one(num_tokens))
        sent(limiter, *map(str, range(num_requests - 1)))
        limiter.record_sent("a", one(), 1.0)
        limiter.record_refusal("a", RateReport(), 1.0)
        state = limiter.state(1.0)
        assert (state.requests.limit, state.tokens.limit) == limits

    def test_never_lower_a_limit_below_one(self):
        limiter = make_limiter(rpm=1)
        sent(limiter, "a")
        limiter.record_sent("b", one(), 0.0)
        limiter.record_refusal("b", RateReport(), 0.0)
        assert limiter.state(0.0).requests.limit == 1

    def test_the_guess_holds_for_an_hour_or_until_there_are_new_limits(self):
        limiter = make_limiter(rpm=100)
        sent(limiter, *map(str, range(50)))
        limiter.record_sent("a", one(), 1.0)
        limiter.record_refusal("a", RateReport(), 1.0)
        assert limiter.state(3600.9).requests.limit == 35
        assert limiter.state(3601.0).requests.limit == 100
        limiter.use_limits(RateLimits(rpm=20, tpm=30, max_cost_per_hour=4, max_cost_per_day=5))
        state = limiter.state(3601.0)
        windows = (state.requests, state.tokens, state.cost_hour, state.cost_day)
        assert [window.limit for window in windows] == [20, 30, 4, 5]
        limiter.use_limits(RateLimits())
        assert limiter.state(3601.0).requests.limit is None


class TestLeases:
    def test_are_what_each_holder_has_now(self):
        limiter = make_limiter(rpm=10)
        limiter.set_leased("g0", Amount(3, 30, 1.0), 0.0)
        limiter.set_leased("g1", Amount(1, 5, 0.5), 0.0)
        assert used(limiter, 0.0) == (4, 35, 1.5, 1.5)
        limiter.set_leased("g0", Amount(1, 10, 0.5), 0.0)
        assert used(limiter, 0.0) == (2, 15, 1.0, 1.0)
        limiter.set_leased("g0", Amount(), 0.0)
        limiter.set_leased("g0", Amount(), 0.0)  # of nothing
        assert used(limiter, 0.0) == (1, 5, 0.5, 0.5)
        limiter.set_leased("g1", Amount(), 0.0)
        assert used(limiter, 0.0) == (0, 0, 0, 0)

    def test_leave_no_rest_of_rounding(self):
        limiter = make_limiter()
        for holder, cost in (("g0", 0.1), ("g1", 0.2), ("g2", 0.3)):
            limiter.set_leased(holder, Amount(1, 0, cost), 0.0)
        limiter.record_sent("a", one(0, 0.7), 0.0)
        for holder in ("g2", "g0", "g1"):
            limiter.set_leased(holder, Amount(), 0.0)
        limiter.end_reservation("a", None, 0.0)
        assert used(limiter, 0.0) == (0, 0, 0.0, 0.0)

    def test_keep_what_others_have_while_rests_are_cleared(self):
        limiter = make_limiter()
        limiter.set_leased("g0", Amount(2, 20), 0.0)
        sent(limiter, "a")
        limiter.end_reservation("a", None, 0.0)
        assert used(limiter, 0.0)[0] == 3
        limiter.record_sent("b", one(), 0.0)
        limiter.set_leased("g0", Amount(), 0.0)
        assert used(limiter, 0.0)[0] == 2
