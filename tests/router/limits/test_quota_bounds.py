"""A tenant's limits to the last token: who just fits, who does not, and what each leaves."""

import math

import pytest

from router.limits.tenant_quota import Exceeded, Reservation, TenantLimits, TenantQuota, TokenBucket
from router.types import Usage


def quota(**limits) -> TenantQuota:
    return TenantQuota(TenantLimits(**limits), now_s=0.0)


class TestBucket:
    def test_gives_back_no_more_than_it_holds(self):
        bucket = TokenBucket(60.0, now_s=0.0)
        bucket.withdraw(10.0, now_s=0.0)
        bucket.withdraw(-25.0, now_s=0.0)
        assert bucket.level(0.0) == 60.0

    def test_refills_from_when_it_was_looked_at_last(self):
        bucket = TokenBucket(60.0, now_s=5.0)
        bucket.withdraw(60.0, now_s=5.0)
        assert [bucket.level(at_s) for at_s in (5.0, 6.0, 6.0, 8.5)] == [0.0, 1.0, 1.0, 3.5]

    def test_waits_not_at_all_for_what_it_has_or_holds(self):
        bucket = TokenBucket(60.0, now_s=0.0)
        assert bucket.wait_s(60.0, 0.0) == 0.0
        bucket.withdraw(20.0, 0.0)
        assert bucket.wait_s(40.0, 0.0) == 0.0
        assert bucket.wait_s(60.0, 0.0) == 20.0
        assert bucket.wait_s(60.5, 0.0) == math.inf
        assert TokenBucket(120.0, 0.0).wait_s(1.0, 0.0) == 0.0

    def test_a_new_rate_is_how_fast_it_refills(self):
        bucket = TokenBucket(60.0, now_s=0.0)
        bucket.withdraw(60.0, now_s=0.0)
        bucket.resize(120.0, now_s=30.0)  # half is back
        assert bucket.level(30.0) == 90.0
        assert bucket.level(31.0) == 92.0


class TestReserves:
    def test_up_to_the_limit(self):
        mine = quota(tokens_per_min=100, requests_per_min=2, max_concurrent_requests=2)
        assert mine.reserve(30, 20, 1, 0.0) == Reservation(50.0, 1)
        assert mine.reserve(30, 20, 1, 0.0) == Reservation(50.0, 1)
        assert mine.num_concurrent == 2
        assert mine.remaining(0.0) == {"requests": (2, 0.0, 60.0), "tokens": (100, 0.0, 60.0)}

    def test_the_whole_minute_for_a_prompt_that_fills_it(self):
        mine = quota(tokens_per_min=100)
        assert mine.reserve(100, 50, 1, 0.0) == Reservation(100.0, 1)
        assert mine.reserve(100, 50, 1, 60.0) == Reservation(100.0, 1)

    def test_never_for_one_that_does_not_fit(self):
        mine = quota(tokens_per_min=100, requests_per_min=5)
        assert mine.reserve(101, 1, 1, 0.0) == Exceeded("tokens_per_min", math.inf)
        assert mine.remaining(0.0) == {"requests": (5, 5.0, 0.0), "tokens": (100, 100.0, 0.0)}

    @pytest.mark.parametrize(("at_s", "fits"), [(29.9, False), (30.0, True)])
    def test_as_soon_as_there_is_room(self, at_s, fits):
        mine = quota(requests_per_min=2)
        mine.reserve(1, 1, 1, 0.0)
        mine.reserve(1, 1, 1, 0.0)
        assert isinstance(mine.reserve(1, 1, 1, at_s), Reservation) == fits

    def test_every_sequence(self):
        mine = quota(tokens_per_min=1000)
        assert mine.reserve(10, 20, 3, 0.0) == Reservation(70.0, 3)
        assert mine.predict_output_tokens(20) == 20

    def test_without_limits_all_the_same(self):
        mine = quota()
        assert mine.reserve(10, 20, 1, 0.0) == Reservation(30.0, 1)
        assert mine.remaining(0.0) == {}

    @pytest.mark.parametrize("limit", ["tokens_per_min", "requests_per_min"])
    def test_under_one_limit_alone(self, limit):
        mine = quota(**{limit: 30})
        assert mine.reserve(10, 20, 1, 0.0) == Reservation(30.0, 1)
        left = 0.0 if limit == "tokens_per_min" else 29.0
        assert mine.remaining(0.0) == {limit.partition("_")[0]: (30, left, (30 - left) * 2.0)}


class TestEnds:
    def test_as_reserved_where_nobody_counted(self):
        mine = quota(tokens_per_min=100)
        mine.end_reservation(mine.reserve(30, 20, 1, 0.0), None, 0.0)
        assert mine.remaining(0.0)["tokens"][1] == 50.0
        assert mine.num_concurrent == 0
        assert mine.predict_output_tokens(None) == 256.0

    def test_in_debt_where_it_took_more(self):
        mine = quota(tokens_per_min=100)
        usage = Usage(num_prompt_tokens=40, num_output_tokens=90)
        mine.end_reservation(mine.reserve(30, 20, 1, 0.0), usage, 0.0)
        assert mine.remaining(0.0)["tokens"] == (100, 0.0, 78.0)
        assert mine.reserve(1, 0, 1, 0.0) == Exceeded("tokens_per_min", pytest.approx(18.6))

    def test_all_given_back_where_it_took_nothing(self):
        mine = quota(tokens_per_min=100)
        mine.end_reservation(mine.reserve(30, 20, 1, 0.0), Usage(), 0.0)
        assert mine.remaining(0.0)["tokens"] == (100, 100.0, 0.0)
        assert mine.predict_output_tokens(None) == 256.0  # that was no answer to learn from

    def test_and_teaches_how_long_answers_are(self):
        mine = quota()
        usage = Usage(num_prompt_tokens=5, num_output_tokens=1)
        for _ in range(300):
            mine.end_reservation(mine.reserve(5, None, 1, 0.0), usage, 0.0)
        assert mine.predict_output_tokens(None) == pytest.approx(1.0, abs=0.1)


class TestNewLimits:
    def test_keep_what_is_used(self):
        mine = quota(tokens_per_min=100, requests_per_min=10)
        mine.reserve(30, 20, 1, 0.0)
        limits = TenantLimits(tokens_per_min=80, requests_per_min=20, max_concurrent_requests=1)
        mine.use_limits(limits, 0.0)
        assert mine.limits is limits
        assert mine.remaining(0.0) == {"requests": (20, 19.0, 3.0), "tokens": (80, 30.0, 37.5)}
        assert mine.reserve(1, 1, 1, 0.0) == Exceeded("max_concurrent_requests", 1.0)

    def test_that_are_none_hold_nobody_back(self):
        mine = quota(tokens_per_min=100)
        mine.use_limits(TenantLimits(), 0.0)
        assert mine.remaining(0.0) == {}
        assert isinstance(mine.reserve(1000, 1, 1, 0.0), Reservation)
