"""Requests that are at a provider, and what becomes of them."""

import msgspec

from router.limits.rate_limit import RateReport
from router.providers.provider import Key
from router.providers.quotes import Quote
from router.queueing.hold_queue import HoldQueue
from router.resilience.breaker import BreakerState, Failure, TripReason
from router.types import Fallback, Request, Usage


class Sent(msgspec.Struct):
    """A request at a provider."""

    request: Request
    key: Key
    permit: int
    sent_s: float
    has_started: bool = False


class ProviderCalls:
    """Each with a reservation in its key's budget and a permit of its breaker, until it ends."""

    def __init__(self, queue: HoldQueue) -> None:
        """`queue` counts what a tenant is given, here as well."""
        self._queue = queue
        self._sent: dict[str, Sent] = {}

    def __len__(self) -> int:
        return len(self._sent)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._sent

    def begin(self, request: Request, offer: Quote, now_s: float) -> Fallback:
        """Send a request to whoever offers to answer it now."""
        key = offer.key
        permit = key.breaker.begin(now_s)
        key.budget.reserve(request.id, offer.amount, now_s)
        self._sent[request.id] = Sent(request, key, permit, now_s)
        self._queue.charge(request)
        return Fallback(request.id, key.provider.name, key.name)

    def count(self, request_id: str, report: RateReport, now_s: float) -> None:
        """The provider has begun to answer: it has counted the request."""
        sent = self._sent.get(request_id)
        if sent is not None:
            sent.key.budget.count(request_id, now_s)
            sent.key.budget.report(report, now_s)

    def start(self, request_id: str, now_s: float) -> None:
        """A first token has come."""
        sent = self._sent.get(request_id)
        if sent is None or sent.has_started:
            return
        sent.has_started = True
        ttft_s = max(0.0, now_s - sent.sent_s)
        provider, breaker = sent.key.provider, sent.key.breaker
        if provider.settings.breaker.is_slow(ttft_s, provider.ttft_s):
            breaker.slow(sent.permit, now_s)
        provider.learn_ttft(ttft_s)
        if breaker.status is BreakerState.HALF_OPEN:
            breaker.succeed(sent.permit, now_s)  # a probe need not wait for a long answer's end

    def finish(self, request_id: str, usage: Usage | None, now_s: float) -> bool:
        """Whether the request was at a provider, which has answered it whole."""
        sent = self._sent.pop(request_id, None)
        if sent is None:
            return False
        sent.key.breaker.succeed(sent.permit, now_s)
        provider, budget = sent.key.provider, sent.key.budget
        budget.count(request_id, now_s)
        counted = None
        if usage is not None:
            counted = provider.counted(sent.request, usage, budget.limits)
        budget.settle(request_id, counted, now_s)
        if usage is not None:
            provider.learn_usage(sent.request, usage)
            self._queue.settle(sent.request, usage)
        return True

    def cancel(self, request_id: str, now_s: float) -> bool:
        """Whether the request was at a provider; whose fault its end is, nobody knows."""
        sent = self._sent.pop(request_id, None)
        if sent is None:
            return False
        sent.key.breaker.release(sent.permit)
        sent.key.budget.count(request_id, now_s)  # it was sent, so it may have been counted
        sent.key.budget.settle(request_id, None, now_s)
        return True

    def refuse(self, request_id: str, report: RateReport, now_s: float) -> Request | None:
        """The provider has answered 429: the request, to be placed anew."""
        sent = self._sent.pop(request_id, None)
        if sent is None:
            return None
        sent.key.breaker.release(sent.permit)
        sent.key.budget.refuse(request_id, report, now_s)
        return sent.request

    def fail(
        self, request_id: str, failure: Failure, *, was_sent: bool, lasts: bool, now_s: float
    ) -> Request | None:
        """The provider has failed: the request, marked as tried there; None if it is unknown.

        `was_sent` unless the provider certainly never saw it; `lasts` where the
        next call would fail in the same way (a key that is not accepted).
        """
        sent = self._sent.pop(request_id, None)
        if sent is None:
            return None
        key = sent.key
        key.breaker.fail(sent.permit, failure, now_s)
        if lasts:
            key.breaker.trip(TripReason.LOST, now_s)
        if was_sent:
            key.budget.count(request_id, now_s)
        key.budget.settle(request_id, None, now_s)
        return msgspec.structs.replace(
            sent.request, tried=(*sent.request.tried, key.id), retried_s=now_s
        )
