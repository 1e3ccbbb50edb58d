import math
import random

import pytest

from router.limits.tenant_quota import Exceeded, Reservation, TenantLimits, TenantQuota, TokenBucket
from router.types import Usage


def quota(**limits) -> TenantQuota:
    return TenantQuota(TenantLimits(**limits), now_s=0.0)


def used(num_prompt_tokens: int, num_output_tokens: int) -> Usage:
    return Usage(num_prompt_tokens=num_prompt_tokens, num_output_tokens=num_output_tokens)


class TestTokenBucket:
    def test_refills_evenly_and_holds_one_minute(self):
        bucket = TokenBucket(60.0, now_s=0.0)
        bucket.withdraw(60.0, now_s=0.0)
        assert bucket.wait_s(1.0, now_s=0.0) == 1.0
        assert bucket.level(now_s=10.0) == 10.0
        assert bucket.level(now_s=1000.0) == 60.0

    def test_debt_is_paid_before_anything_goes(self):
        bucket = TokenBucket(60.0, now_s=0.0)
        bucket.withdraw(90.0, now_s=0.0)
        assert bucket.wait_s(1.0, now_s=0.0) == 31.0

    def test_more_than_it_holds_never_goes(self):
        assert TokenBucket(60.0, now_s=0.0).wait_s(61.0, now_s=0.0) == math.inf

    def test_what_is_used_stays_used_when_the_rate_changes(self):
        bucket = TokenBucket(60.0, now_s=0.0)
        bucket.withdraw(50.0, now_s=0.0)
        bucket.resize(100.0, now_s=0.0)
        assert bucket.level(now_s=0.0) == 50.0
        bucket.resize(40.0, now_s=0.0)
        assert bucket.level(now_s=0.0) == -10.0

    def test_a_clock_that_steps_back_gives_nothing(self):
        bucket = TokenBucket(60.0, now_s=10.0)
        bucket.withdraw(60.0, now_s=10.0)
        assert bucket.level(now_s=5.0) == 0.0
        assert bucket.level(now_s=11.0) == 1.0


class TestQuota:
    def test_reserves_ahead_and_corrects_to_what_it_took(self):
        mine = quota(tokens_per_min=1000)
        reservation = mine.reserve(300, 200, 1, now_s=0.0)
        assert reservation == Reservation(500.0, 1)
        assert mine.remaining(0.0)["tokens"] == (1000, 500.0, 30.0)
        mine.end_reservation(reservation, used(300, 50), now_s=0.0)
        assert mine.remaining(0.0)["tokens"][1] == 650.0

    def test_a_request_that_is_refused_takes_nothing(self):
        mine = quota(requests_per_min=10, tokens_per_min=100, max_concurrent_requests=2)
        assert mine.reserve(80, 10, 1, now_s=0.0) == Reservation(90.0, 1)
        assert mine.reserve(80, 0, 1, now_s=0.0) == Exceeded("tokens_per_min", 42.0)
        assert mine.remaining(0.0)["requests"][1] == 9.0
        assert mine.num_concurrent == 1

    def test_tells_the_limit_that_takes_longest(self):
        mine = quota(requests_per_min=1, tokens_per_min=6000)
        mine.reserve(5999, 1, 1, now_s=0.0)
        assert mine.reserve(100, 0, 1, now_s=0.0) == Exceeded("requests_per_min", 60.0)

    def test_concurrent_requests(self):
        mine = quota(max_concurrent_requests=1)
        reservation = mine.reserve(1, 1, 1, now_s=0.0)
        assert mine.reserve(1, 1, 1, now_s=0.0) == Exceeded("max_concurrent_requests", 1.0)
        mine.end_reservation(reservation, None, now_s=0.0)
        assert isinstance(mine.reserve(1, 1, 1, now_s=0.0), Reservation)

    def test_a_long_answer_may_go_but_never_a_prompt_beyond_the_minute(self):
        mine = quota(tokens_per_min=1000)
        assert mine.reserve(1001, 1, 1, now_s=0.0) == Exceeded("tokens_per_min", math.inf)
        assert mine.reserve(900, None, 8, now_s=0.0) == Reservation(1000.0, 8)

    def test_learns_how_long_answers_are(self):
        mine = quota()
        for _ in range(200):
            reservation = mine.reserve(10, None, 2, now_s=0.0)
            mine.end_reservation(reservation, used(10, 80), now_s=0.0)  # 40 each
        assert mine.predict_output_tokens(None) == pytest.approx(40.0, abs=1.0)
        assert mine.predict_output_tokens(16, num_sequences=2) == 32.0

    def test_other_limits_hold_at_once_and_reservations_outlive_them(self):
        mine = quota()
        reservation = mine.reserve(500, 100, 1, now_s=0.0)
        mine.use_limits(TenantLimits(tokens_per_min=100, max_concurrent_requests=1), now_s=0.0)
        assert isinstance(mine.reserve(10, 1, 1, now_s=0.0), Exceeded)
        mine.end_reservation(reservation, used(500, 100), now_s=0.0)
        assert mine.num_concurrent == 0

    @pytest.mark.parametrize("seed", range(5))
    def test_never_more_than_the_rate_and_one_bucket(self, seed):
        """Over any span, whatever is asked for and however wrong predictions are."""
        rng = random.Random(seed)
        mine = quota(requests_per_min=30, tokens_per_min=6000)
        open_, passed, now_s = [], [], 0.0
        for _ in range(3000):
            now_s += rng.expovariate(2.0)
            reservation = mine.reserve(rng.randint(1, 500), rng.randint(1, 400), 1, now_s)
            if isinstance(reservation, Reservation):
                open_.append(reservation)
                passed.append((now_s, reservation.num_tokens))
            elif not math.isinf(reservation.wait_s):
                assert reservation.wait_s > 0.0
            if open_ and rng.random() < 0.5:
                done = open_.pop(0)  # took exactly what was reserved
                mine.end_reservation(done, used(int(done.num_tokens), 0), now_s)
        for start in range(0, len(passed), 7):
            num_tokens, begin_s = 0.0, passed[start][0]
            for count, (at_s, tokens) in enumerate(passed[start:], 1):
                num_tokens += tokens
                span_min = (at_s - begin_s) / 60.0
                slack = 1.0 * count  # the correction above rounds down by less than one each
                assert num_tokens <= 6000 * (1 + span_min) + slack
                assert count <= 30 * (1 + span_min) + 1e-6
