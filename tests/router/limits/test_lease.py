"""Gateways that lease from one limiter: messages that are lost, late or never answered."""

import heapq
import random

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from router.limits.lease import LEASE_S, LeasedLimiter, LeaseServer, LeaseUpdate
from router.limits.rate_limit import Amount, RateReport
from router.limits.settings import RateLimits
from tests.support.rate_limited_provider import Provider

ONE = Amount(1, 10)


def renew(server: LeaseServer, limiter: LeasedLimiter, now_s: float, gateway_id="g0") -> None:
    """One exchange of update and grant, without delay."""
    limiter.on_grant(server.answer_update(gateway_id, limiter.make_update(now_s), now_s), now_s)


def make_server(*, is_restart: bool = False, **limits) -> LeaseServer:
    return LeaseServer(RateLimits(**limits), 0.0, is_restart=is_restart)


def used(server: LeaseServer, now_s: float) -> float:
    return server.limiter.state(now_s).requests.used


def test_what_waits_is_granted_as_far_as_there_is_room():
    server, limiter = make_server(rpm=2), LeasedLimiter(RateLimits(rpm=2))
    assert limiter.next_update_s() is None
    assert limiter.wait_s(ONE, 0.0) > 0.0
    for name in "abc":
        limiter.note_waiting(name, ONE)
    assert limiter.next_update_s() <= 0.0
    renew(server, limiter, 0.0)
    assert limiter.wait_s(ONE, 0.0) == 0.0
    limiter.reserve("a", ONE, 0.0)
    assert used(server, 0.0) >= 1
    with pytest.raises(ValueError, match="already"):
        limiter.reserve("a", ONE, 0.0)
    with pytest.raises(ValueError, match="no room"):
        limiter.reserve("z", Amount(5), 0.0)


def test_what_is_not_used_returns():
    server, limiter = make_server(rpm=10), LeasedLimiter(RateLimits(rpm=10))
    limiter.note_waiting("a", ONE)
    renew(server, limiter, 0.0)
    assert used(server, 0.1) == 1
    assert limiter.next_update_s() == 1.0  # renewed while something is left
    renew(server, limiter, 1.0)
    assert used(server, 1.0) == 0
    assert limiter.wait_s(ONE, 1.0) > 0.0
    assert limiter.next_update_s() is None


def test_a_dead_gateways_lease_counts_as_spent_when_it_ends():
    server, limiter = make_server(rpm=10), LeasedLimiter(RateLimits(rpm=10))
    for name in "ab":
        limiter.note_waiting(name, ONE)
    renew(server, limiter, 0.0)
    limiter.reserve("a", ONE, 0.0)
    other = LeasedLimiter(RateLimits(rpm=10))
    renew(server, other, LEASE_S, "g1")  # the first is silent
    assert used(server, LEASE_S) == 2
    assert used(server, LEASE_S + 59.0) == 2
    assert used(server, LEASE_S + 61.0) == 0
    # By its own clock it has stopped before.
    assert limiter.wait_s(ONE, LEASE_S) > 0.0


def test_a_lease_server_that_was_restarted_waits_for_its_predecessors_window():
    server, limiter = make_server(rpm=10, is_restart=True), LeasedLimiter(RateLimits(rpm=10))
    limiter.note_waiting("a", ONE)
    renew(server, limiter, 0.0)
    assert limiter.wait_s(ONE, 0.1) > 60.0


def test_a_repeated_update_is_answered_alike_and_counted_once():
    server = make_server(rpm=10)
    update = LeaseUpdate(number=1, waiting=[ONE])
    assert server.answer_update("g0", update, 0.0) == server.answer_update("g0", update, 0.1)
    assert used(server, 0.1) == 1


def test_a_grant_that_comes_too_late_is_not_used():
    server, limiter = make_server(rpm=10), LeasedLimiter(RateLimits(rpm=10))
    limiter.note_waiting("a", ONE)
    grant = server.answer_update("g0", limiter.make_update(0.0), 3.0)
    limiter.on_grant(grant, LEASE_S + 0.1)
    assert limiter.wait_s(ONE, LEASE_S + 0.1) > 0.0


class Gateway:
    """One gateway with more to send than there is room for."""

    def __init__(self, name: str, limits: RateLimits) -> None:
        self.name = name
        self.limiter = LeasedLimiter(limits)
        self.waiting: list[tuple[str, Amount]] = []
        self.is_alive = True


@hypothesis_settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rpm=st.sampled_from([20, 200]),
    loss=st.sampled_from([0.0, 0.2]),
    dies=st.booleans(),
)
def test_gateways_together_never_overrun_a_provider(seed, rpm, loss, dies):
    """Three of them, with delays everywhere, lost messages, and one that dies."""
    rng = random.Random(seed)
    limits = RateLimits(rpm=rpm, tpm=100 * rpm)
    server, provider = LeaseServer(limits, 0.0, is_restart=False), Provider(rpm, 100 * rpm)
    gateways = [Gateway(f"g{index}", limits) for index in range(3)]
    events: list[tuple[float, int, object]] = []
    num_events = 0

    def later(at_s: float, action) -> None:
        nonlocal num_events
        num_events += 1
        heapq.heappush(events, (at_s, num_events, action))

    def send(gateway: Gateway, now_s: float) -> None:
        if not gateway.is_alive:
            return
        gateway.limiter._waiting.clear()
        while gateway.waiting:
            request_id, amount = gateway.waiting[0]
            if gateway.limiter.wait_s(amount, now_s) > 0.0:
                for name, each in gateway.waiting[:8]:
                    gateway.limiter.note_waiting(name, each)
                break
            gateway.waiting.pop(0)
            gateway.limiter.reserve(request_id, amount, now_s)
            there_s = now_s + rng.random() * 0.5
            later(there_s, lambda at_s, r=request_id, a=amount: arrive(gateway, r, a, at_s))

    def arrive(gateway: Gateway, request_id: str, amount: Amount, now_s: float) -> None:
        taken, report = provider.take(amount.num_tokens, now_s)
        assert taken, "429"
        later(
            now_s + rng.random() * 0.5,
            lambda at_s: answered(gateway, request_id, amount, report, at_s),
        )

    def answered(gateway, request_id, amount, report: RateReport, now_s: float) -> None:
        if gateway.is_alive:
            gateway.limiter.mark_counted(request_id, now_s)
            gateway.limiter.record_report(report, now_s)
            end = gateway.limiter.end_reservation
            later(now_s + 2.0, lambda at_s: end(request_id, amount, at_s))

    def send_update(gateway: Gateway, now_s: float) -> None:
        if not gateway.is_alive:
            return
        due_s = gateway.limiter.next_update_s()
        if due_s is not None and due_s <= now_s:
            update = gateway.limiter.make_update(now_s)
            if rng.random() < loss:
                later(now_s + 0.2, lambda at_s: gateway.limiter.on_no_answer())
            else:
                later(now_s + rng.random() * 0.02, lambda at_s: answer(gateway, update, at_s))
        later(now_s + 0.02, lambda at_s: send_update(gateway, at_s))

    def answer(gateway: Gateway, update: LeaseUpdate, now_s: float) -> None:
        grant = server.answer_update(gateway.name, update, now_s)
        if rng.random() < loss:
            later(now_s + 0.2, lambda at_s: gateway.limiter.on_no_answer())
        else:
            later(now_s + rng.random() * 0.02, lambda at_s: granted(gateway, grant, at_s))

    def granted(gateway: Gateway, grant, now_s: float) -> None:
        gateway.limiter.on_grant(grant, now_s)
        send(gateway, now_s)

    def arrivals(gateway: Gateway, number: int, now_s: float) -> None:
        if len(gateway.waiting) < 50:
            gateway.waiting.append((f"q{number}", Amount(1, rng.randint(10, 150))))
        send(gateway, now_s)
        later(now_s + rng.expovariate(rpm / 60.0), lambda at_s: arrivals(gateway, number + 1, at_s))

    for gateway in gateways:
        later(0.0, lambda at_s, g=gateway: send_update(g, at_s))
        later(0.0, lambda at_s, g=gateway: arrivals(g, 0, at_s))
    if dies:
        later(70.0, lambda at_s: setattr(gateways[0], "is_alive", False))
    until_s = 240.0
    while events[0][0] < until_s:
        at_s, _, action = heapq.heappop(events)
        action(at_s)
    assert provider.num_refused == 0
    share = max(
        provider.num_taken / (rpm * until_s / 60.0),
        provider.num_tokens_taken / (100 * rpm * until_s / 60.0),
    )
    assert share >= (0.6 if loss else 0.9)
