r"""Requests that are at a provider: what is held for each of them, and how each ends.

    (none) --start_call--> sent --record_answer--> counted --mark_first_token--> begun
                             |                        |                            |
                             \------------------------+----------------------------+--> (none)
                              by complete_call, cancel_call, refuse_call (429) or fail_call

From its start to its end an attempt has a reservation in its key's rate limiter and a permit
of its key's breaker. What never happens: an attempt that has ended and still holds either.
"""

import msgspec

from router.limits.rate_limit import RateReport
from router.providers.provider import ProviderKey
from router.providers.quotes import Quote
from router.queueing.hold_queue import HoldQueue
from router.resilience.breaker import BreakerState, Failure, TripReason
from router.types import FailedCall, Fallback, Request, Usage


class ProviderAttempt(msgspec.Struct):
    """One provider's try at a request, under one of its keys."""

    request: Request
    key: ProviderKey
    permit: int  # of the key's breaker
    sent_s: float
    has_begun: bool = False  # its first token has come


class ProviderCalls:
    """The open attempts at providers, at most one of each request."""

    def __init__(self, queue: HoldQueue) -> None:
        """`queue` counts what a tenant is given, here as well."""
        self._queue = queue
        self._attempts: dict[str, ProviderAttempt] = {}

    def __len__(self) -> int:
        return len(self._attempts)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._attempts

    def start_call(self, request: Request, quote: Quote, now_s: float) -> Fallback:
        """Reserve for a request under the quoted key. Return the decision to send it there."""
        key = quote.key
        permit = key.breaker.begin_call(now_s)
        key.limiter.reserve(request.id, quote.amount, now_s)
        self._attempts[request.id] = ProviderAttempt(request, key, permit, now_s)
        self._queue.charge_prompt(request)
        return Fallback(request.id, key.provider.name, key.name)

    def record_answer(self, request_id: str, report: RateReport, now_s: float) -> None:
        """Count a request under its key: the provider has begun to answer, and so counted it."""
        attempt = self._attempts.get(request_id)
        if attempt is not None:
            attempt.key.limiter.mark_counted(request_id, now_s)
            attempt.key.limiter.record_report(report, now_s)

    def mark_first_token(self, request_id: str, now_s: float) -> ProviderAttempt | None:
        """Learn from a first token how fast the provider is, and whether its breaker closes.

        Return the attempt; None if there is none, or it had begun before.
        """
        attempt = self._attempts.get(request_id)
        if attempt is None or attempt.has_begun:
            return None
        attempt.has_begun = True
        ttft_s = max(0.0, now_s - attempt.sent_s)
        provider, breaker = attempt.key.provider, attempt.key.breaker
        if provider.settings.breaker.is_slow(ttft_s, provider.ttft_s):
            breaker.record_slow(attempt.permit, now_s)
        provider.learn_ttft(ttft_s)
        if breaker.status is BreakerState.HALF_OPEN:
            # A probe need not wait for a long answer's end.
            breaker.record_success(attempt.permit, now_s)
        return attempt

    def complete_call(
        self, request_id: str, usage: Usage | None, now_s: float
    ) -> ProviderAttempt | None:
        """End the attempt at a request that was answered whole. Return it; None: there is none."""
        attempt = self._attempts.pop(request_id, None)
        if attempt is None:
            return None
        attempt.key.breaker.record_success(attempt.permit, now_s)
        provider, limiter = attempt.key.provider, attempt.key.limiter
        limiter.mark_counted(request_id, now_s)
        counted = None
        if usage is not None:
            counted = provider.counted_amount(attempt.request, usage, limiter.limits)
        limiter.end_reservation(request_id, counted, now_s)
        if usage is not None:
            provider.learn_usage(attempt.request, usage)
            self._queue.record_usage(attempt.request, usage)
        return attempt

    def cancel_call(self, request_id: str, now_s: float) -> bool:
        """End the attempt at a request whose client has left. Return False if there is none."""
        attempt = self._attempts.pop(request_id, None)
        if attempt is None:
            return False
        attempt.key.breaker.release_permit(attempt.permit)
        # It was sent, so the provider may have counted it.
        attempt.key.limiter.mark_counted(request_id, now_s)
        attempt.key.limiter.end_reservation(request_id, None, now_s)
        return True

    def refuse_call(self, request_id: str, report: RateReport, now_s: float) -> Request | None:
        """End an attempt that the provider has answered 429.

        Return the request, to be placed anew; None if there is no attempt at it.
        """
        attempt = self._attempts.pop(request_id, None)
        if attempt is None:
            return None
        attempt.key.breaker.release_permit(attempt.permit)
        attempt.key.limiter.record_refusal(request_id, report, now_s)
        return attempt.request

    def fail_call(
        self,
        request_id: str,
        failure: Failure,
        *,
        was_sent: bool,
        lasts: bool,
        may_be_requests: bool,
        now_s: float,
    ) -> Request | None:
        """End an attempt that the provider did not carry through.

        Return the request, marked as tried there; None if there is no attempt at it.
        `was_sent` unless the provider certainly never saw it; `lasts` where the next call
        would fail in the same way (a key that is not accepted); `may_be_requests` where the
        request may be at fault: the breaker hears of it if another one answers.
        """
        attempt = self._attempts.pop(request_id, None)
        if attempt is None:
            return None
        key, failed_calls = attempt.key, attempt.request.failed_calls
        if may_be_requests:
            key.breaker.release_permit(attempt.permit)
            call = FailedCall(key.id, attempt.permit, had_answered=attempt.has_begun)
            failed_calls = (*failed_calls, call)
        else:
            key.breaker.record_failure(attempt.permit, failure, now_s)
        if lasts:
            key.breaker.trip(TripReason.LOST, now_s)
        if was_sent:
            key.limiter.mark_counted(request_id, now_s)
        key.limiter.end_reservation(request_id, None, now_s)
        return msgspec.structs.replace(
            attempt.request,
            tried=(*attempt.request.tried, key.id),
            failed_calls=failed_calls,
            retried_s=now_s,
        )
