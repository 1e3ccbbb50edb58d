"""What happens at providers, and where the requests go from there."""

from collections.abc import Sequence

from router.core.lifecycle import OpenRequests, continued
from router.limits.rate_limit import RateReport
from router.providers.calls import ProviderCalls
from router.providers.provider import MakeLimiter
from router.providers.settings import FallbackSettings, ProviderSettings
from router.providers.spillover import Spillover, make_rate_limiter
from router.resilience.breaker import Failure
from router.types import Decision, Fail, Outcome, Request

# Attempts at one request, after which the request itself is the likely cause of its failures.
_MAX_TRIED = 6


class ProviderEvents:
    """The part of the router that is told of providers; first tokens and ends are the router's."""

    def __init__(self, requests: OpenRequests, calls: ProviderCalls, spillover: Spillover) -> None:
        self._requests = requests
        self._calls = calls
        self._spillover = spillover

    def use(
        self,
        providers: Sequence[ProviderSettings],
        settings: FallbackSettings,
        now_s: float,
        make_limiter: MakeLimiter = make_rate_limiter,
    ) -> list[Decision]:
        """Go by these providers, in their order, from now on.

        What is known of those of the same name stays; requests at one that is
        gone end there.
        """
        self._spillover.use_providers(providers, settings, make_limiter, now_s)
        return self._requests.place_held(now_s, at_once=True)

    def on_answer(self, request_id: str, report: RateReport, now_s: float) -> list[Decision]:
        """Take in that a provider has begun to answer, and what it says of its limits."""
        self._calls.record_answer(request_id, report, now_s)
        return []

    def on_refused(self, request_id: str, report: RateReport, now_s: float) -> list[Decision]:
        """Place a request again that a provider refused for its rate: 429."""
        request = self._calls.refuse_call(request_id, report, now_s)
        if request is None:
            return []
        return (
            self._continue(request, now_s)
            if request.has_begun
            else self._requests.enter(request, now_s)
        )

    def on_failed(
        self,
        request_id: str,
        failure: Failure,
        now_s: float,
        *,
        can_retry: bool = True,
        num_output_tokens: int | None = None,
        was_sent: bool = True,
        lasts: bool = False,
        may_be_requests: bool = False,
    ) -> list[Decision]:
        """Place a request again that a provider did not carry through, or give it up.

        `can_retry` while nothing of the answer has been passed on; after that another
        provider may go on with it, if `num_output_tokens` tells how many this one has
        sent; `was_sent` unless the provider never saw the request; `lasts` if whatever
        is sent under this key would fail in the same way; `may_be_requests` if it may be the
        request's fault: that shows when another one answers it, or none does.
        """
        request = self._calls.fail_call(
            request_id,
            failure,
            was_sent=was_sent,
            lasts=lasts,
            may_be_requests=may_be_requests,
            now_s=now_s,
        )
        if request is None:
            return []
        if len(request.tried) < _MAX_TRIED:
            if can_retry:
                return self._requests.enter(request, now_s)
            if num_output_tokens is not None:
                return self._continue(continued(request, num_output_tokens), now_s)
        return [Fail(request_id), *self._requests.close(Outcome.FAILED, now_s, at_once=True)]

    def _continue(self, request: Request, now_s: float) -> list[Decision]:
        """Have another provider go on at once with what one has begun, or give it up."""
        if (fallback := self._spillover.continue_reply(request, now_s)) is None:
            return [Fail(request.id), *self._requests.close(Outcome.FAILED, now_s, at_once=True)]
        self._requests.num_retries += 1
        return [fallback, *self._requests.place_held(now_s)]
