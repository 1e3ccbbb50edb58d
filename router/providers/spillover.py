r"""Which requests go to a provider, when, and to which one.

    held --engines cannot, or late--> at a provider --first token--> answered --> ended
      ^                                  |  |
      |   429: the budget pauses         |  \--fails before its first token--> the next
      \----------------------------------/      provider, an engine, or held again

The first provider in order that keeps the promise gets the request, at once or,
where its budget returns in time, a little later; if none keeps it, the one that
is soonest. Nothing goes anywhere that is not predicted to answer sooner than an
engine here would, or that costs more than it may.

What never happens: a request at two places; more sent under a key than its
budget has room for; a second probe before the first has its verdict.
"""

import heapq
import math
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from router.limits.rate_limit import Amount, RateLimiter, RateLimits
from router.providers.calls import ProviderCalls
from router.providers.late_jobs import MooreHodgson
from router.providers.provider import MakeBudget, Provider, ProviderSettings
from router.providers.quotes import Quote, Quotes
from router.queueing.deadline import ttft_deadline_s
from router.queueing.hold_queue import HoldQueue
from router.resilience.breaker import BreakerLog
from router.scheduling.wait_time import WaitEstimator
from router.settings import RouterSettings
from router.types import Fallback, Request

# How often waits are looked at when nothing else happens: a tenth of the shortest promises.
_LOOK_S = 0.05
# Held requests that one look goes through. It has to reach whoever waits longer than a
# promise, at a thousand requests a second, too, or they are found when it is too late
# (simulated: goodput in a spike 0.66 with 256, 0.96 so). Where providers take them, the
# queue does not grow beyond that; where their budgets do not, the look ends early.
_LOOK_DEPTH = 4096
# Who waits for a budget behind so many others could not go now either.
_MAX_WAITING = 32
_LOG_LENGTH = 1000


class FallbackSettings(BaseModel):
    """When requests go to providers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    spill: Literal["late", "full", "unavailable"] = Field(
        "late",
        description="unavailable: only when no engine takes work; full: also when the hold "
        "queue is full; late: also when the predicted first token comes after its promise "
        "and the provider's is sooner",
    )
    late_factor: float = Field(
        1.0,
        gt=0,
        description="late is a first token predicted after so many times its promise; below "
        "1 keeps a margin for what predictions are off by",
    )


class Spillover:
    """Sends requests to providers."""

    def __init__(
        self,
        queue: HoldQueue,
        waits: WaitEstimator,
        calls: ProviderCalls,
        settings: RouterSettings,
        rng: random.Random,
    ) -> None:
        self.providers: list[Provider] = []
        self.log = BreakerLog(maxlen=_LOG_LENGTH)
        self.settings = FallbackSettings()
        self._queue = queue
        self._waits = waits
        self._router_settings = settings
        self._rng = rng
        self.calls = calls
        self.offers = Quotes()
        self._looked_s = -math.inf
        self._next_look_s: float | None = None
        self.num_spilled = 0

    def use(
        self,
        providers: Sequence[ProviderSettings],
        settings: FallbackSettings,
        make_budget: MakeBudget,
        now_s: float,
    ) -> None:
        """Go by these providers from now on; those of the same name keep what they know."""
        known = {provider.name: provider for provider in self.providers}
        self.settings = settings
        self.providers = []
        for provider_settings in providers:
            provider = known.get(provider_settings.name)
            if provider is None:
                provider = Provider(provider_settings, make_budget, self._rng, self.log, now_s)
            else:
                provider.use(provider_settings, now_s)
            self.providers.append(provider)
        self.offers.providers = self.providers

    # Sending

    def send_held(self, now_s: float, *, at_once: bool = False) -> list[Fallback]:
        """Send what should not wait here any longer.

        Looks at most every 50 ms, unless `at_once`.
        """
        if not self.providers or not len(self._queue):
            self._next_look_s = None
            return []
        if not at_once and now_s < self._looked_s + _LOOK_S:
            return []
        self._looked_s = now_s
        self._next_look_s = None
        fallbacks: list[Fallback] = []
        reliefs: dict[str, MooreHodgson] = {}
        ahead: dict[str, Amount] = {}  # that wait for a budget, by key id
        num_waiting = 0
        for request in list(self._most_urgent()):
            relief = reliefs.get(request.model)
            if relief is None:
                relief = reliefs[request.model] = MooreHodgson(self.offers.price)
            relief.pass_by(request)
            while (offered := self._relieve(request, relief, now_s, ahead)) is not None:
                leaving, offer = offered
                relief.leave(leaving)
                if offer.wait_s <= 0.0:
                    self._queue.remove(leaving.id)
                    fallbacks.append(self._send(leaving, offer, now_s))
                else:
                    key = offer.key
                    key.budget.want(leaving.id, offer.amount)
                    ahead[key.id] = ahead.get(key.id, Amount()) + offer.amount
                    self._look_by(now_s + offer.wait_s)
                    num_waiting += 1
                if leaving is request:
                    break
            if num_waiting >= _MAX_WAITING:
                break
        return fallbacks

    def send_now(self, request: Request, now_s: float) -> Fallback | None:
        """Send a request that is not held to whoever has room for it now; None if nobody."""
        return None if request.has_begun else self.go_on(request, now_s)

    def go_on(self, request: Request, now_s: float) -> Fallback | None:
        """The same, also of one whose reply a provider has begun, to one that goes on with it."""
        deadline_s = ttft_deadline_s(request, self._router_settings)
        offer = self.offers.best(request, deadline_s, math.inf, now_s, {})
        if offer is None or offer.wait_s > 0.0:
            return None
        return self._send(request, offer, now_s)

    def next_look_s(self) -> float | None:
        """When to look again, whatever happens; None while nothing is held."""
        return self._next_look_s

    def state(self, now_s: float) -> dict[str, object]:
        """For people to read; JSON-able."""
        return {
            "spill": self.settings.spill,
            "num_open": len(self.calls),
            "num_spilled": self.num_spilled,
            "providers": {provider.name: provider.state(now_s) for provider in self.providers},
        }

    # How it is decided

    def _most_urgent(self) -> Iterator[Request]:
        """Held requests that some provider answers for, in the order of the queue."""
        lanes = [
            self._queue.in_order(model)
            for model in self._queue.num_tokens_by_model
            if self.offers.serves(model) and self._may_leave(model)
        ]
        merged = lanes[0] if len(lanes) == 1 else heapq.merge(*lanes, key=self._queue.key)
        return islice(merged, _LOOK_DEPTH)

    def _may_leave(self, model: str) -> bool:
        """Whether anybody who waits for this model may go at all."""
        return self.settings.spill == "late" or math.isinf(self._waits.wait_s(model, 0))

    def _relieve(
        self, request: Request, relief: MooreHodgson, now_s: float, ahead: dict[str, Amount]
    ) -> tuple[Request, Quote] | None:
        """Who should go, and to whom, so that a request is in time; None if it is, or nobody."""
        num_tokens_before = relief.num_tokens - request.num_prompt_tokens
        wait_s = self._waits.first_token_s(request, num_tokens_before)
        here_s = now_s + wait_s
        if math.isinf(wait_s):
            offer = self._offer(request, here_s, now_s, ahead)
            if offer is None:
                self._look_by(now_s + _LOOK_S)  # breakers close without anybody's word
            return None if offer is None else (request, offer)
        self._look_by(now_s + _LOOK_S)  # waits here grow without anybody's word
        if not self._is_late(request, here_s):
            return None
        while (leaving := relief.cheapest()) is not None:
            offer = self._offer(leaving, math.inf, now_s, ahead)
            if offer is not None and offer.sure_s <= ttft_deadline_s(
                leaving, self._router_settings
            ):
                return leaving, offer
        # Nobody would be in time elsewhere. Sooner is better all the same.
        offer = self._offer(request, here_s, now_s, ahead)
        return None if offer is None else (request, offer)

    def _is_late(self, request: Request, here_s: float) -> bool:
        """Whether a first token at `here_s` comes too late."""
        target_s = ttft_deadline_s(request, self._router_settings) - request.arrival_s
        return here_s > request.arrival_s + self.settings.late_factor * target_s

    def _offer(
        self, request: Request, before_s: float, now_s: float, ahead: dict[str, Amount]
    ) -> Quote | None:
        """The offer to take; None if there is none that is sooner."""
        if request.has_begun:
            return None
        deadline_s = ttft_deadline_s(request, self._router_settings)
        return self.offers.best(request, deadline_s, before_s, now_s, ahead)

    def _look_by(self, time_s: float) -> None:
        if self._next_look_s is None or time_s < self._next_look_s:
            self._next_look_s = time_s

    def _send(self, request: Request, offer: Quote, now_s: float) -> Fallback:
        self.num_spilled += 1
        return self.calls.begin(request, offer, now_s)


def own_budget(key_id: str, limits: RateLimits) -> RateLimiter:
    """A budget that this gateway has for itself."""
    return RateLimiter(limits)
