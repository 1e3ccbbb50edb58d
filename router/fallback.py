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
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from router.breaker import BreakerLog, BreakerState, Failure, TripReason
from router.budget import Amount, Budget, BudgetLimits, RateReport
from router.hold import HoldQueue
from router.lease import LeasedBudget
from router.promise import promised_s
from router.provider import Key, MakeBudget, Provider, ProviderSettings
from router.settings import RouterSettings
from router.types import Fallback, Request, Usage
from router.waits import Waits

# How often waits are looked at when nothing else happens: a tenth of the shortest promises.
_LOOK_S = 0.05
# Held requests that one look goes through. It has to reach whoever waits longer than a
# promise, at a thousand requests a second, too, or they are found when it is too late
# (simulated: goodput in a spike 0.66 with 256, 0.96 so). Where providers take them, the
# queue does not grow beyond that; where their budgets do not, the look ends early.
_LOOK_DEPTH = 4096
# Who waits for a budget behind so many others could not go now either.
_MAX_WAITING = 32
# A key gets the same request this often: twice, as its first failure may have been luck.
_MAX_TRIES = 2
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
        1.0, gt=0, description="late is a first token after so many times its promise"
    )


class Sent(msgspec.Struct):
    """A request at a provider."""

    request: Request
    key: Key
    permit: int
    sent_s: float
    has_started: bool = False


class Spill:
    """Sends requests to providers; knows which are there."""

    def __init__(
        self, queue: HoldQueue, waits: Waits, settings: RouterSettings, rng: random.Random
    ) -> None:
        self.providers: list[Provider] = []
        self.log = BreakerLog(maxlen=_LOG_LENGTH)
        self.settings = FallbackSettings()
        self._queue = queue
        self._waits = waits
        self._router_settings = settings
        self._rng = rng
        self._sent: dict[str, Sent] = {}
        self._looked_s = -math.inf
        self._next_look_s: float | None = None
        self.num_spilled = 0

    def __len__(self) -> int:
        return len(self._sent)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._sent

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

    def serves(self, model: str) -> bool:
        """Whether any provider answers for this model."""
        return any(provider.serves(model) for provider in self.providers)

    # Sending

    def send_held(self, now_s: float, *, at_once: bool = False) -> list[Fallback]:
        """Send what should not wait here any longer, the most urgent first.

        Looks at most every 50 ms, unless `at_once`.
        """
        if not self.providers or not len(self._queue):
            self._next_look_s = None
            return []
        if not at_once and now_s < self._looked_s + _LOOK_S:
            return []
        self._looked_s = now_s
        next_look_s = math.inf
        fallbacks: list[Fallback] = []
        num_tokens: Counter[str] = Counter()  # ahead of the next, by model
        ahead: dict[str, Amount] = {}  # that wait for a budget, by key id
        num_waiting = 0
        for request in list(self._most_urgent()):
            num_tokens[request.model] += request.num_prompt_tokens
            here_s = now_s + self._waits.wait_s(request.model, num_tokens[request.model])
            offer = None
            if self._is_due(request, here_s):
                offer = self._offer(request, here_s, now_s, ahead)
            if offer is None or here_s < math.inf:
                # Waits here grow, and breakers close, without anybody's word.
                next_look_s = now_s + _LOOK_S
            if offer is None:
                continue
            key, wait_s = offer
            amount = key.provider.amount(request)
            if wait_s <= 0.0:
                self._queue.remove(request.id)
                num_tokens[request.model] -= request.num_prompt_tokens
                fallbacks.append(self._send(request, key, amount, now_s))
                continue
            key.budget.want(request.id, amount)
            ahead[key.id] = ahead.get(key.id, Amount()) + amount
            next_look_s = min(next_look_s, now_s + wait_s)
            num_waiting += 1
            if num_waiting >= _MAX_WAITING:
                break
        self._next_look_s = None if math.isinf(next_look_s) else next_look_s
        return fallbacks

    def send_now(self, request: Request, now_s: float) -> Fallback | None:
        """Send a request that is not held to whoever has room for it now; None if nobody."""
        offer = None if request.has_begun else self._offer(request, math.inf, now_s, {})
        if offer is None or offer[1] > 0.0:
            return None
        return self._send(request, offer[0], offer[0].provider.amount(request), now_s)

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

    def next_look_s(self) -> float | None:
        """When to look again, whatever happens; None while nothing is held."""
        return self._next_look_s

    # What became of it

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

    def has_started(self, request_id: str) -> bool:
        """Whether a first token has come from a provider."""
        sent = self._sent.get(request_id)
        return sent is not None and sent.has_started

    def state(self, now_s: float) -> dict[str, object]:
        """For people to read; JSON-able."""
        return {
            "spill": self.settings.spill,
            "num_open": len(self._sent),
            "num_spilled": self.num_spilled,
            "providers": {provider.name: provider.state(now_s) for provider in self.providers},
        }

    def leased_budgets(self) -> Iterator[tuple[str, LeasedBudget]]:
        """Budgets that somebody else has, by key id."""
        for provider in self.providers:
            for key in provider.keys:
                if isinstance(key.budget, LeasedBudget):
                    yield key.id, key.budget

    # How it is decided

    def _most_urgent(self) -> Iterator[Request]:
        """Held requests that some provider answers for, in the order of the queue."""
        lanes = [
            self._queue.in_order(model)
            for model in self._queue.num_tokens_by_model
            if self.serves(model)
        ]
        merged = lanes[0] if len(lanes) == 1 else heapq.merge(*lanes, key=self._queue.key)
        for _, request in zip(range(_LOOK_DEPTH), merged, strict=False):
            if not request.has_begun:
                yield request

    def _is_due(self, request: Request, here_s: float) -> bool:
        """Whether the request may go, if its first token comes at `here_s` here."""
        if math.isinf(here_s):
            return True
        if self.settings.spill != "late":
            return False
        promise_s = promised_s(request, self._router_settings) - request.arrival_s
        return here_s > request.arrival_s + self.settings.late_factor * promise_s

    def _offer(
        self, request: Request, here_s: float, now_s: float, ahead: dict[str, Amount]
    ) -> tuple[Key, float] | None:
        """The key to wait for, and how long, seconds; None if staying is better.

        One that failed the request before only where there is no other.
        """
        offer = self._best(request, here_s, now_s, ahead, request.tried)
        if offer is None and request.tried:
            offer = self._best(request, here_s, now_s, ahead, _exhausted(request))
        return offer

    def _best(
        self,
        request: Request,
        here_s: float,
        now_s: float,
        ahead: dict[str, Amount],
        but: Collection[str],
    ) -> tuple[Key, float] | None:
        """The same, without the keys in `but`."""
        promise_s = promised_s(request, self._router_settings)
        best: tuple[Key, float] | None = None
        best_s = here_s
        for provider in self._affordable(request):
            soonest = provider.soonest(provider.amount(request), now_s, ahead, but)
            if soonest is None:
                continue
            first_s = now_s + soonest[1] + provider.ttft_s
            if first_s >= best_s:
                continue
            if first_s <= promise_s:
                return soonest
            best, best_s = soonest, first_s
        return best

    def _affordable(self, request: Request) -> Iterator[Provider]:
        """Providers that answer for the request's model at a cost that it may have."""
        for provider in self.providers:
            if provider.serves(request.model):
                most = provider.settings.max_cost_per_request
                if most is None or provider.amount(request).cost <= most:
                    yield provider

    def _send(self, request: Request, key: Key, amount: Amount, now_s: float) -> Fallback:
        permit = key.breaker.begin(now_s)
        key.budget.reserve(request.id, amount, now_s)
        self._sent[request.id] = Sent(request, key, permit, now_s)
        self._queue.charge(request)
        self.num_spilled += 1
        return Fallback(request.id, key.provider.name, key.name)


def own_budget(key_id: str, limits: BudgetLimits) -> Budget:
    """A budget that this gateway has for itself."""
    return Budget(limits)


def _exhausted(request: Request) -> list[str]:
    """The keys, and engines, that the request is not given to any more."""
    return [name for name in request.tried if request.tried.count(name) >= _MAX_TRIES]
