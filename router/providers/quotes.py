"""What could providers do for a request, and which of them should?"""

import math
from collections.abc import Collection, Iterator, Sequence

import msgspec

from router.limits.rate_limit import Amount
from router.providers.provider import Provider, ProviderKey
from router.types import Request

# A key gets the same request this often: twice, as its first failure may have been luck.
_MAX_TRIES = 2


class Quote(msgspec.Struct, frozen=True):
    """What sending a request under one key would come to."""

    key: ProviderKey
    amount: Amount  # to reserve
    wait_s: float  # until the key's limits have room; 0: now
    latest_first_token_s: float  # by when it will have come, all but surely


class Quotes:
    """Quotes of all providers, in their order."""

    def __init__(self, providers: Sequence[Provider] = ()) -> None:
        self.providers = providers

    def serves(self, model: str) -> bool:
        """Whether any provider answers for this model."""
        return any(provider.serves(model) for provider in self.providers)

    def price(self, request: Request) -> float | None:
        """What the first provider that may have the request would take; None if none may."""
        provider = next(self._affordable(request), None)
        return None if provider is None else provider.amount_to_reserve(request).cost

    def best(
        self,
        request: Request,
        ttft_deadline_s: float,
        before_s: float,
        now_s: float,
        ahead: dict[str, Amount],
    ) -> Quote | None:
        """Return the quote to take, None if no first token comes before `before_s`.

        It is the first in order that meets the deadline, else the soonest. `ahead` is what
        others wait for, by key id. A key that failed the request before is taken only where
        there is no other.
        """
        quote = self._best(request, ttft_deadline_s, before_s, now_s, ahead, request.tried)
        if quote is None and request.tried:
            excluded = _exhausted(request)
            quote = self._best(request, ttft_deadline_s, before_s, now_s, ahead, excluded)
        return quote

    def wait_s(self, request: Request, now_s: float) -> float:
        """Seconds until some key's limits have room for a request; inf if none ever has.

        Breakers are left aside: they close again.
        """
        excluded = _exhausted(request)
        return min(
            (
                key.limiter.wait_s(provider.amount_to_reserve(request), now_s)
                for provider in self._affordable(request)
                for key in provider.keys
                if key.id not in excluded
            ),
            default=math.inf,
        )

    def _best(
        self,
        request: Request,
        ttft_deadline_s: float,
        before_s: float,
        now_s: float,
        ahead: dict[str, Amount],
        excluded: Collection[str],
    ) -> Quote | None:
        best: Quote | None = None
        for provider in self._affordable(request):
            amount = provider.amount_to_reserve(request)
            soonest = provider.soonest_key(amount, now_s, ahead, excluded)
            if soonest is None:
                continue
            key, wait_s = soonest
            first_token_s = now_s + wait_s + provider.ttft_s
            if first_token_s < before_s:
                latest_s = now_s + wait_s + provider.max_ttft_s
                best = Quote(key, amount, wait_s, latest_s)
                if first_token_s <= ttft_deadline_s:
                    return best
                before_s = first_token_s
        return best

    def _affordable(self, request: Request) -> Iterator[Provider]:
        """Providers that may have the request, by its model, its cost and how far it has come."""
        if request.engines_only:
            return
        for provider in self.providers:
            if provider.serves(request.model) and (
                provider.settings.continues or not request.has_begun
            ):
                most = provider.settings.max_cost_per_request
                if most is None or provider.amount_to_reserve(request).cost <= most:
                    yield provider


def _exhausted(request: Request) -> list[str]:
    """The keys, and engines, that the request is not given to any more."""
    return [name for name in request.tried if request.tried.count(name) >= _MAX_TRIES]
