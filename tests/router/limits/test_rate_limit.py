import heapq
import math
import random

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from router.limits.rate_limit import Amount, RateLimiter, RateReport
from router.limits.settings import RateLimits
from tests.support.rate_limited_provider import Provider


def make_limiter(**limits) -> RateLimiter:
    return RateLimiter(RateLimits(**limits))


def one(num_tokens: int = 0, cost: float = 0.0) -> Amount:
    return Amount(1, num_tokens, cost)


def used(limiter: RateLimiter, name: str, now_s: float) -> float:
    return getattr(limiter.state(now_s), name).used


def test_what_is_reserved_has_room_for_nobody_else():
    limiter = make_limiter(tpm=100)
    limiter.reserve("a", one(60), 0.0)
    assert limiter.wait_s(one(41), 0.1) > 0.0
    with pytest.raises(ValueError, match="no room"):
        limiter.reserve("b", one(41), 0.1)
    with pytest.raises(ValueError, match="already"):
        limiter.record_sent("a", one(1), 0.1)


def test_what_is_larger_than_a_limit_never_has_room():
    assert make_limiter(tpm=100).wait_s(one(101), 0.0) == math.inf
    assert make_limiter(max_cost_per_hour=1.0).wait_s(one(cost=1.5), 0.0) == math.inf
    assert make_limiter(max_concurrency=2).wait_s(Amount(3), 0.0) == math.inf


def test_what_was_reserved_and_not_counted_returns():
    limiter = make_limiter(tpm=1000)
    limiter.reserve("a", one(60), 0.0)
    limiter.mark_counted("a", 0.5)
    limiter.end_reservation("a", one(25), 3.0)
    assert used(limiter, "tokens", 3.0) == 25
    assert used(limiter, "tokens", 61.0) == 0


def test_tokens_beyond_the_reservation_count():
    limiter = make_limiter(tpm=1000)
    limiter.reserve("a", one(60), 0.0)
    limiter.mark_counted("a", 0.5)
    limiter.end_reservation("a", one(80), 3.0)
    assert used(limiter, "tokens", 3.0) == 80


def test_a_request_that_the_provider_never_saw_counts_nothing():
    limiter = make_limiter(rpm=5, tpm=1000)
    limiter.reserve("a", one(60), 0.0)
    limiter.end_reservation("a", None, 0.1)
    assert used(limiter, "requests", 0.1) == used(limiter, "tokens", 0.1) == 0


def test_cost_is_corrected_to_what_it_was():
    limiter = make_limiter(max_cost_per_hour=10.0, max_cost_per_day=10.0)
    limiter.reserve("a", one(10, 4.0), 0.0)
    limiter.mark_counted("a", 1.0)
    limiter.end_reservation("a", one(10, 1.0), 2.0)
    assert used(limiter, "cost_hour", 2.0) == used(limiter, "cost_day", 2.0) == 1.0
    assert limiter.wait_s(one(cost=9.0), 2.0) == 0.0
    assert 3600 < limiter.wait_s(one(cost=9.5), 2.0) < 90_000


def test_calls_open_at_a_time_are_bounded():
    limiter = make_limiter(max_concurrency=1)
    limiter.reserve("a", one(), 0.0)
    limiter.mark_counted("a", 0.1)
    assert 0.0 < limiter.wait_s(one(), 1.0) < math.inf
    limiter.end_reservation("a", None, 2.0)
    assert limiter.wait_s(one(), 2.0) == 0.0


def test_near_a_limit_requests_are_spaced():
    """The first half goes at once, then the gaps grow to the limit's own rate."""
    limiter = make_limiter(rpm=60)
    now_s, sent_s = 0.0, []
    while now_s < 300.0:
        wait_s = limiter.wait_s(one(), now_s)
        if wait_s == 0.0:
            request_id = f"q{len(sent_s)}"
            limiter.reserve(request_id, one(), now_s)
            limiter.mark_counted(request_id, now_s)
            limiter.end_reservation(request_id, None, now_s)
            sent_s.append(now_s)
        now_s += wait_s
    assert sum(at_s == 0.0 for at_s in sent_s) in (30, 31, 32)
    gaps_s = [later - earlier for earlier, later in zip(sent_s[-60:], sent_s[-59:], strict=False)]
    assert max(gaps_s) < 1.2
    assert len(sent_s) >= 0.98 * 300


def test_a_refusal_pauses_for_as_long_as_it_says_or_doubling():
    limiter = make_limiter(rpm=1000)
    pauses_s = []
    now_s = 0.0
    for number in range(8):
        limiter.reserve(f"q{number}", one(), now_s)
        limiter.record_refusal(f"q{number}", RateReport(), now_s)
        pauses_s.append(limiter.wait_s(one(), now_s))
        now_s += pauses_s[-1]
    assert pauses_s == [1, 2, 4, 8, 16, 32, 60, 60]
    limiter.reserve("a", one(), now_s)
    limiter.record_refusal("a", RateReport(retry_after_s=7.0), now_s)
    assert limiter.wait_s(one(), now_s) == 7.0
    limiter.reserve("b", one(), now_s + 7.0)
    limiter.mark_counted("b", now_s + 7.5)  # answered: the next pause is the first again
    limiter.reserve("c", one(), now_s + 8.0)
    limiter.record_refusal("c", RateReport(), now_s + 8.0)
    assert limiter.wait_s(one(), now_s + 8.0) == 1.0
    assert limiter.num_refused == 10


def test_a_refusal_that_does_not_tell_the_limit_lowers_it_for_an_hour():
    limiter = make_limiter(rpm=100)
    for number in range(50):
        limiter.record_sent(f"q{number}", one(), 0.0)
        limiter.mark_counted(f"q{number}", 0.0)
    limiter.record_sent("refused", one(), 1.0)
    limiter.record_refusal("refused", RateReport(), 1.0)
    assert limiter.state(1.0).requests.limit == 35
    assert limiter.state(3602.0).requests.limit == 100


def test_limits_can_change_while_requests_are_open():
    limiter = make_limiter(rpm=10)
    for number in range(4):
        limiter.reserve(f"q{number}", one(), 0.0)
        limiter.mark_counted(f"q{number}", 0.0)
    limiter.use_limits(RateLimits(rpm=4))
    assert limiter.wait_s(one(), 1.0) > 50.0
    limiter.use_limits(RateLimits())
    assert limiter.wait_s(one(), 1.0) == 0.0


def drive(
    limiter: RateLimiter,
    provider: Provider,
    rng: random.Random,
    *,
    until_s: float,
    headers: bool,
    halve_s: float = math.inf,
    max_delay_s: float = 1.0,
) -> None:
    """Send whatever has room, with random sizes and delays both ways, until then."""
    now_s, number = 0.0, 0
    events: list[tuple[float, int, str, Amount, RateReport | None]] = []
    amount = one(rng.randint(10, 400))
    while now_s < until_s:
        wait_s = limiter.wait_s(amount, now_s)
        if wait_s > 0.0:
            now_s = min(now_s + wait_s, events[0][0] if events else math.inf)
        else:
            number += 1
            limiter.reserve(f"q{number}", amount, now_s)
            there_s = now_s + rng.random() * max_delay_s
            heapq.heappush(events, (there_s, number, "arrives", amount, None))
            amount = one(rng.randint(10, 400))
        while events and events[0][0] <= now_s:
            at_s, key, event, sent, report = heapq.heappop(events)
            if at_s >= halve_s:
                provider.rpm, provider.tpm, halve_s = provider.rpm // 2, provider.tpm // 2, math.inf
            back_s = at_s + rng.random() * max_delay_s
            if event == "arrives":
                taken, report = provider.take(sent.num_tokens, at_s)
                event = "answered" if taken else "refused"
                heapq.heappush(events, (back_s, key, event, sent, report if headers else None))
            elif event == "refused":
                limiter.record_refusal(f"q{key}", report or RateReport(), now_s)
            elif event == "answered":
                limiter.mark_counted(f"q{key}", now_s)
                limiter.record_report(report or RateReport(), now_s)
                heapq.heappush(events, (back_s + 3.0, key, "ended", sent, None))
            else:
                limiter.end_reservation(f"q{key}", sent, now_s)


@hypothesis_settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rpm=st.sampled_from([3, 60, 1000]),
    tpm=st.sampled_from([400, 10_000]),
    headers=st.booleans(),
)
def test_no_provider_is_overrun_whatever_the_delays(seed, rpm, tpm, headers):
    provider = Provider(rpm, tpm)
    limiter = make_limiter(rpm=rpm, tpm=tpm)
    drive(limiter, provider, random.Random(seed), until_s=400.0, headers=headers)
    assert provider.num_refused == 0
    # Of the limit that binds, almost all is used: requests differ in size by so much.
    share = max(provider.num_taken / (rpm * 400 / 60), provider.num_tokens_taken / (tpm * 400 / 60))
    assert share >= (0.9 if rpm > 3 and tpm > 400 else 0.5)


@hypothesis_settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), headers=st.booleans())
def test_a_halved_limit_is_found_with_few_refusals(seed, headers):
    provider = Provider(60, 1_000_000)
    limiter = make_limiter(rpm=60, tpm=1_000_000)
    rng = random.Random(seed)
    drive(limiter, provider, rng, until_s=900.0, headers=headers, halve_s=300.0, max_delay_s=0.5)
    assert provider.rpm == 30
    assert provider.num_refused <= 3


class Reservations(RuleBasedStateMachine):
    """Any order of events, also such as no shell would cause."""

    @initialize(
        rpm=st.sampled_from([None, 1, 5]),
        tpm=st.sampled_from([None, 50]),
        concurrency=st.sampled_from([None, 2]),
    )
    def start(self, rpm, tpm, concurrency):
        self.limiter = make_limiter(
            rpm=rpm,
            tpm=tpm,
            max_concurrency=concurrency,
            max_cost_per_day=0.7,
        )
        self.limits = self.limiter.limits
        self.now_s = 0.0
        self.num_sent = 0
        self.open: dict[str, Amount] = {}
        self.sent: list[tuple[float, Amount]] = []

    @rule(num_tokens=st.integers(0, 60), cost=st.sampled_from([0.0, 0.1, 0.3]))
    def send(self, num_tokens, cost):
        amount = one(num_tokens, cost)
        if self.limiter.wait_s(amount, self.now_s) > 0.0:
            return
        request_id = f"q{self.num_sent}"
        self.num_sent += 1
        self.limiter.reserve(request_id, amount, self.now_s)
        self.open[request_id] = amount
        self.sent.append((self.now_s, amount))
        recent = [amount for at_s, amount in self.sent if at_s > self.now_s - 60.0]
        assert len(recent) <= (self.limits.rpm or math.inf)
        assert sum(amount.num_tokens for amount in recent) <= (self.limits.tpm or math.inf)
        assert len(self.open) <= (self.limits.max_concurrency or math.inf)

    @rule(number=st.integers(0, 9), end=st.sampled_from(["completed", "unseen", "refused"]))
    def end(self, number, end):
        request_id = f"q{max(0, self.num_sent - number)}"  # open, ended or never seen
        amount = self.open.pop(request_id, one())
        if end == "completed":
            counted = one(amount.num_tokens, amount.cost / 2)
            self.limiter.end_reservation(request_id, counted, self.now_s)
        elif end == "unseen":
            self.limiter.end_reservation(request_id, None, self.now_s)
            self.sent = [entry for entry in self.sent if entry[1] is not amount]
        else:
            self.limiter.record_refusal(request_id, RateReport(retry_after_s=1.0), self.now_s)
            self.sent = [entry for entry in self.sent if entry[1] is not amount]

    @rule(number=st.integers(0, 9))
    def answered(self, number):
        self.limiter.mark_counted(f"q{max(0, self.num_sent - number)}", self.now_s)

    @rule(remaining=st.integers(0, 5))
    def report(self, remaining):
        report = RateReport(limit_requests=5, remaining_requests=remaining)
        self.limiter.record_report(report, self.now_s)

    @rule(seconds=st.sampled_from([0.01, 1.0, 30.0, 61.0]))
    def wait(self, seconds):
        self.now_s += seconds

    @invariant()
    def the_open_are_counted(self):
        assert self.limiter.state(self.now_s).num_open == len(self.open)
        for name in ("requests", "tokens", "cost_day"):
            assert used(self.limiter, name, self.now_s) >= 0

    def teardown(self):
        if not hasattr(self, "limiter"):
            return
        for request_id in list(self.open):
            self.limiter.end_reservation(request_id, None, self.now_s)
        state = self.limiter.state(self.now_s + 90_000.0)
        assert state.num_open == 0
        for name in ("requests", "tokens", "cost_hour", "cost_day"):
            assert getattr(state, name).used == 0


TestReservations = Reservations.TestCase
