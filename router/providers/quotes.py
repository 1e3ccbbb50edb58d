"""What providers could do for a request, and which of them should."""

import math
from collections.abc import Collection, Iterator, Sequence

import msgspec

from router.limits.rate_limit import Amount
from router.providers.provider import Key, Provider
from router.types import Request

# A key gets the same request this often: twice, as its first failure may have been luck.
_MAX_TRIES = 2


class Quote(msgspec.Struct, frozen=True):
    """A first token from a provider."""

    key: Key
    amount: Amount  # to reserve
    wait_s: float  # until the budget has room; 0: now
    first_s: float  # when the token should come
    sure_s: float  # by when it will have come, all but surely


class Quotes:
    """All providers, in their order."""

    def __init__(self, providers: Sequence[Provider] = ()) -> None:
        self.providers = providers

    def serves(self, model: str) -> bool:
        """Whether any provider answers for this model."""
        return any(provider.serves(model) for provider in self.providers)

    def price(self, request: Request) -> float | None:
        """What the first that may have the request would take for it; None if none may."""
        provider = next(self._affordable(request), None)
        return None if provider is None else provider.amount(request).cost

    def best(
        self,
        request: Request,
        ttft_deadline_s: float,
        before_s: float,
        now_s: float,
        ahead: dict[str, Amount],
    ) -> Quote | None:
        """The first in order that keeps the promise, or the soonest; None if not `before_s`.

        `ahead` is what others wait for, by key id. A key that failed the request before
        only where there is no other.
        """
        offer = self._best(request, ttft_deadline_s, before_s, now_s, ahead, request.tried)
        if offer is None and request.tried:
            but = _exhausted(request)
            offer = self._best(request, ttft_deadline_s, before_s, now_s, ahead, but)
        return offer

    def wait_s(self, request: Request, now_s: float) -> float:
        """When some budget has room for a request, seconds from now; inf if none ever has.

        Breakers aside: they close again.
        """
        but = _exhausted(request)
        return min(
            (
                key.budget.room_s(provider.amount(request), now_s)
                for provider in self._affordable(request)
                for key in provider.keys
                if key.id not in but
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
        but: Collection[str],
    ) -> Quote | None:
        best: Quote | None = None
        for provider in self._affordable(request):
            amount = provider.amount(request)
            soonest = provider.soonest(amount, now_s, ahead, but)
            if soonest is None:
                continue
            key, wait_s = soonest
            first_s = now_s + wait_s + provider.ttft_s
            if first_s < before_s:
                sure_s = now_s + wait_s + provider.sure_ttft_s
                best = Quote(key, amount, wait_s, first_s, sure_s)
                if first_s <= ttft_deadline_s:
                    return best
                before_s = first_s
        return best

    def _affordable(self, request: Request) -> Iterator[Provider]:
        """Providers that may have the request, by its model, its cost and how far it has come."""
        for provider in self.providers:
            if provider.serves(request.model) and (
                provider.settings.continues or not request.has_begun
            ):
                most = provider.settings.max_cost_per_request
                if most is None or provider.amount(request).cost <= most:
                    yield provider


def _exhausted(request: Request) -> list[str]:
    """The keys, and engines, that the request is not given to any more."""
    return [name for name in request.tried if request.tried.count(name) >= _MAX_TRIES]
