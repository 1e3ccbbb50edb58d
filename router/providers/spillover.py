r"""Which requests go to a provider, when, and to which one?

    held --engines cannot, or late--> at a provider --first token--> answered --> ended
      ^                                  |  |
      |   429: its key pauses            |  \--fails before its first token--> the next
      \----------------------------------/      provider, an engine, or held again

The first provider in order that meets the request's deadline for the first token gets it:
at once, or a little later where its limits have room in time. If none meets the deadline,
the soonest gets it. Nothing goes to a provider that is not predicted to answer sooner than
an engine here would, or where it costs more than it may.

What never happens: a request at two places; more sent under a key than its limits have
room for; a second probe before the first has its verdict.
"""

import heapq
import math
import random
from collections.abc import Iterator, Sequence
from itertools import islice

import msgspec

from router.core.settings import RouterSettings
from router.limits.rate_limit import Amount, RateLimiter
from router.limits.settings import RateLimits
from router.providers.calls import ProviderCalls
from router.providers.late_jobs import MooreHodgson
from router.providers.provider import MakeLimiter, Provider, ProviderKey, ProviderState
from router.providers.quotes import Quote, Quotes
from router.providers.settings import FallbackSettings, ProviderSettings, SpillWhen
from router.queueing.deadline import ttft_deadline_s
from router.queueing.hold_queue import HoldQueue
from router.resilience.breaker import BreakerLog
from router.scheduling.wait_time import WaitEstimator
from router.types import Fallback, Request

# How often waits are checked when nothing else happens: a tenth of the shortest TTFT targets.
_CHECK_S = 0.05
# Held requests that one check goes through. It has to reach those that wait longer than their
# target, also at a thousand requests a second, or they are found when it is too late
# (simulated: goodput in a spike 0.66 with 256, 0.96 with this). Where providers take them, the
# queue does not grow beyond that; where their limits do not, the check ends early.
_CHECK_DEPTH = 4096
# A request that waits for limits behind so many others could not go now either.
_MAX_WAITING = 32
_LOG_LENGTH = 1000


class SpilloverState(msgspec.Struct, frozen=True, kw_only=True):
    """What has gone to providers, and how these are."""

    spill: SpillWhen
    num_open: int  # requests at providers now
    num_spilled: int
    providers: dict[str, ProviderState]  # by name


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
        self.calls = calls
        self.quotes = Quotes()
        self.num_spilled = 0
        self._queue = queue
        self._waits = waits
        self._router_settings = settings
        self._rng = rng
        self._checked_s = -math.inf
        self._next_check_s: float | None = None

    def use_providers(
        self,
        providers: Sequence[ProviderSettings],
        settings: FallbackSettings,
        make_limiter: MakeLimiter,
        now_s: float,
    ) -> None:
        """Go by these providers from now on; those of the same name keep what they know."""
        known = {provider.name: provider for provider in self.providers}
        self.settings = settings
        self.providers = []
        for provider_settings in providers:
            provider = known.get(provider_settings.name)
            if provider is None:
                provider = Provider(provider_settings, make_limiter, self._rng, self.log, now_s)
            else:
                provider.use_settings(provider_settings, now_s)
            self.providers.append(provider)
        self.quotes.providers = self.providers

    def find_key(self, key_id: str) -> ProviderKey | None:
        """Return the key of this id; None if there is none any more."""
        keys = (key for provider in self.providers for key in provider.keys if key.id == key_id)
        return next(keys, None)

    # Sending

    def send_held(self, now_s: float, *, at_once: bool = False) -> list[Fallback]:
        """Take from the queue what should not wait here any longer. Return where it goes.

        Checks at most every 50 ms, unless `at_once`.
        """
        if not self.providers or not len(self._queue):
            self._next_check_s = None
            return []
        if not at_once and now_s < self._checked_s + _CHECK_S:
            return []
        self._checked_s = now_s
        self._next_check_s = None
        fallbacks: list[Fallback] = []
        schedules: dict[str, MooreHodgson] = {}  # by model
        ahead: dict[str, Amount] = {}  # what waits for a key's limits, by key id
        num_waiting = 0
        for request in list(self._most_urgent()):
            schedule = schedules.get(request.model)
            if schedule is None:
                schedule = schedules[request.model] = MooreHodgson(self.quotes.price)
            schedule.add_request(request)
            while (choice := self._choose_leaving(request, schedule, now_s, ahead)) is not None:
                leaving, quote = choice
                schedule.remove_request(leaving)
                if quote.wait_s <= 0.0:
                    self._queue.remove(leaving.id)
                    fallbacks.append(self._send(leaving, quote, now_s))
                else:
                    key = quote.key
                    key.limiter.note_waiting(leaving.id, quote.amount)
                    ahead[key.id] = ahead.get(key.id, Amount()) + quote.amount
                    self._check_by(now_s + quote.wait_s)
                    num_waiting += 1
                if leaving is request:
                    break
            if num_waiting >= _MAX_WAITING:
                break
        return fallbacks

    def send_now(self, request: Request, now_s: float) -> Fallback | None:
        """Send a request that is not held to a provider that has room now; None if none has."""
        return None if request.has_begun else self.continue_reply(request, now_s)

    def continue_reply(self, request: Request, now_s: float) -> Fallback | None:
        """As `send_now`, also for a request whose reply another provider has begun."""
        deadline_s = ttft_deadline_s(request, self._router_settings)
        quote = self.quotes.best(request, deadline_s, math.inf, now_s, {})
        if quote is None or quote.wait_s > 0.0:
            return None
        return self._send(request, quote, now_s)

    def next_check_s(self) -> float | None:
        """When to check again, whatever happens; None while nothing is held."""
        return self._next_check_s

    def state(self, now_s: float) -> SpilloverState:
        """Return what has gone to providers, and the state of each."""
        return SpilloverState(
            spill=self.settings.spill,
            num_open=len(self.calls),
            num_spilled=self.num_spilled,
            providers={provider.name: provider.state(now_s) for provider in self.providers},
        )

    # How it is decided

    def _most_urgent(self) -> Iterator[Request]:
        """Held requests that some provider answers for, in the order of the queue."""
        queues = [
            self._queue.in_order(model)
            for model in self._queue.num_tokens_by_model
            if self.quotes.serves(model) and self._may_leave(model)
        ]
        merged = queues[0] if len(queues) == 1 else heapq.merge(*queues, key=self._queue.key)
        return islice(merged, _CHECK_DEPTH)

    def _may_leave(self, model: str) -> bool:
        """Whether any request that waits for this model may go at all."""
        return self.settings.spill == "late" or math.isinf(self._waits.wait_s(model, 0))

    def _choose_leaving(
        self, request: Request, schedule: MooreHodgson, now_s: float, ahead: dict[str, Amount]
    ) -> tuple[Request, Quote] | None:
        """Choose who leaves, and for where, so that `request` is on time.

        Return None if it is on time already, or nobody can leave.
        """
        num_tokens_before = schedule.num_tokens - request.num_prompt_tokens
        wait_s = self._waits.first_token_s(request, num_tokens_before)
        first_token_s = now_s + wait_s
        if math.isinf(wait_s):
            quote = self._quote(request, first_token_s, now_s, ahead)
            if quote is None:
                self._check_by(now_s + _CHECK_S)  # breakers close without any event
            return None if quote is None else (request, quote)
        self._check_by(now_s + _CHECK_S)  # waits here grow without any event
        if not self._is_late(request, first_token_s):
            return None
        while (leaving := schedule.pop_cheapest()) is not None:
            quote = self._quote(leaving, math.inf, now_s, ahead)
            if quote is not None and quote.latest_first_token_s <= ttft_deadline_s(
                leaving, self._router_settings
            ):
                return leaving, quote
        # Nobody would be on time elsewhere. Sooner is better all the same.
        quote = self._quote(request, first_token_s, now_s, ahead)
        return None if quote is None else (request, quote)

    def _is_late(self, request: Request, first_token_s: float) -> bool:
        """Whether a first token at this time comes too late."""
        target_s = ttft_deadline_s(request, self._router_settings) - request.arrival_s
        return first_token_s > request.arrival_s + self.settings.late_factor * target_s

    def _quote(
        self, request: Request, before_s: float, now_s: float, ahead: dict[str, Amount]
    ) -> Quote | None:
        """Return the best quote for a held request; None if none is sooner than `before_s`."""
        if request.has_begun:
            return None
        deadline_s = ttft_deadline_s(request, self._router_settings)
        return self.quotes.best(request, deadline_s, before_s, now_s, ahead)

    def _check_by(self, time_s: float) -> None:
        """See to it that the next check is at this time at the latest."""
        if self._next_check_s is None or time_s < self._next_check_s:
            self._next_check_s = time_s

    def _send(self, request: Request, quote: Quote, now_s: float) -> Fallback:
        self.num_spilled += 1
        return self.calls.start_call(request, quote, now_s)


def make_rate_limiter(key_id: str, limits: RateLimits) -> RateLimiter:
    """Return a limiter that this gateway has for itself."""
    return RateLimiter(limits)
