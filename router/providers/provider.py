"""What does a service elsewhere cost, how fast is it, and under which key may it be called?"""

import math
import random
from collections.abc import Callable, Collection

import msgspec

from router.estimators.output_length import PRIOR_TOKENS, MeanOutputLength
from router.limits.lease import LeasedLimiter
from router.limits.rate_limit import Amount, RateLimiter, RateLimiterState
from router.limits.settings import RateLimits
from router.providers.settings import ProviderSettings
from router.resilience.breaker import Breaker, BreakerLog, BreakerView
from router.types import Request, Usage

MakeLimiter = Callable[[str, RateLimits], RateLimiter | LeasedLimiter]

_PER_MILLION = 1e-6
# First tokens over which a provider's usual time is learned: enough to even out single
# ones, few enough to follow its good and bad hours.
_TTFT_MEMORY = 20.0
_OVERDUE_DEVIATIONS = 4.0  # beyond the mean: see `Provider.max_ttft_s`
_USAGE_MEMORY = 50.0  # replies that the usual output and the error of prompt sizes go by
# By how much a prompt's estimated size is off, as a share of it: bytes per token differ by
# so much. Twice that is reserved beside the estimate, as a provider counts the real size.
_PRIOR_PROMPT_ERROR = 0.1


class KeyState(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a key may be used, and how much of it is."""

    breaker: BreakerView
    budget: RateLimiterState


class ProviderState(msgspec.Struct, frozen=True, kw_only=True):
    """A provider without its secrets: the router knows none."""

    models: dict[str, str]  # our name, and its own
    ttft_s: float  # usual, learned
    cost: float  # spent since the start, by what replies really took
    keys: dict[str, KeyState]  # by name


class ProviderKey:
    """A key of a provider, with its rate limiter and its breaker."""

    def __init__(
        self,
        provider: "Provider",
        name: str,
        limiter: RateLimiter | LeasedLimiter,
        breaker: Breaker,
    ) -> None:
        self.id = f"{provider.name}/{name}"
        self.name = name
        self.provider = provider
        self.limiter = limiter
        self.breaker = breaker


class Provider:
    """One provider as the router knows it."""

    def __init__(
        self,
        settings: ProviderSettings,
        make_limiter: MakeLimiter,
        rng: random.Random,
        log: BreakerLog,
        now_s: float,
    ) -> None:
        self.name = settings.name
        self.settings = settings
        self.keys: list[ProviderKey] = []
        self.ttft_s = settings.ttft_s  # usual, learned
        self._ttft_deviation_s = settings.ttft_s / 2.0
        self._num_ttfts = 0
        self.cost = 0.0  # spent since the start, by what replies really took
        self._output_length = MeanOutputLength(PRIOR_TOKENS, _USAGE_MEMORY)
        self._prompt_error = _PRIOR_PROMPT_ERROR  # usual, as a share of the estimate
        self._make_limiter = make_limiter
        self._rng = rng
        self._log = log
        self.use_settings(settings, now_s)

    def use_settings(self, settings: ProviderSettings, now_s: float) -> None:
        """Go by these settings from now on; keys of the same name keep what they know."""
        known = {key.name: key for key in self.keys}
        self.settings = settings
        self.keys = []
        for key_settings in settings.keys:
            key = known.get(key_settings.name)
            if key is None:
                name = f"{self.name}/{key_settings.name}"
                breaker = Breaker(settings.breaker, self._rng, now_s, name=name, log=self._log)
                limiter = self._make_limiter(name, key_settings)
                key = ProviderKey(self, key_settings.name, limiter, breaker)
            else:
                key.limiter.use_limits(key_settings)
            self.keys.append(key)

    def serves(self, model: str) -> bool:
        """Whether it answers for this model of ours."""
        return model in self.settings.models

    def amount_to_reserve(self, request: Request) -> Amount:
        """What to reserve for a request: all the output it may have, the cost it should have.

        Without a limit of the client's own, twice the usual output stands for the most. Of
        exponential lengths 13 % are longer; those are corrected when they have ended.
        """
        most = request.max_output_tokens
        expected = self._output_length.predict(most)
        num_output_tokens = math.ceil(2.0 * expected) if most is None else most
        num_prompt_tokens = math.ceil(request.num_prompt_tokens * (1.0 + 2.0 * self._prompt_error))
        return Amount(
            1,
            num_prompt_tokens + num_output_tokens * request.num_sequences,
            self._cost(request.num_prompt_tokens, expected * request.num_sequences),
        )

    def counted_amount(self, request: Request, usage: Usage, limits: RateLimits) -> Amount:
        """What the provider counts for a request that has ended, by its usage.

        Where the client limited the output and the provider does not return unused tokens,
        the whole limit counts.
        """
        num_output_tokens = usage.num_output_tokens
        most = request.max_output_tokens
        if most is not None and not limits.returns_unused_tokens:
            num_output_tokens = max(num_output_tokens, most * request.num_sequences)
        return Amount(
            1,
            usage.num_prompt_tokens + num_output_tokens,
            self._cost(usage.num_prompt_tokens, usage.num_output_tokens),
        )

    def soonest_key(
        self,
        amount: Amount,
        now_s: float,
        ahead: dict[str, Amount],
        excluded: Collection[str],
    ) -> tuple[ProviderKey, float] | None:
        """Return the key that has room first, and in how many seconds; None if none ever has.

        `ahead` is what others wait for, by key id; keys in `excluded` are left out.
        """
        best: tuple[ProviderKey, float] | None = None
        for key in self.keys:
            key.breaker.tick(now_s)
            if key.id in excluded or not key.breaker.admits():
                continue
            waiting = ahead.get(key.id)
            wait_s = key.limiter.wait_s(amount if waiting is None else amount + waiting, now_s)
            if wait_s < (math.inf if best is None else best[1]):
                best = (key, wait_s)
        return best

    @property
    def max_ttft_s(self) -> float:
        """Seconds within which a first token comes, all but surely.

        The mean and four mean deviations, like TCP's retransmission timer (Jacobson 1988);
        before anything is learned the deviation is half the mean (RFC 6298).
        """
        return self.ttft_s + _OVERDUE_DEVIATIONS * self._ttft_deviation_s

    def learn_ttft(self, ttft_s: float) -> None:
        """Learn from how long a first token took, seconds."""
        self._num_ttfts += 1
        if self._num_ttfts == 1:
            self.ttft_s, self._ttft_deviation_s = ttft_s, ttft_s / 2.0
            return
        memory = min(self._num_ttfts, _TTFT_MEMORY)
        error_s = ttft_s - self.ttft_s
        self.ttft_s += error_s / memory
        self._ttft_deviation_s += (abs(error_s) - self._ttft_deviation_s) / memory

    def learn_usage(self, request: Request, usage: Usage) -> None:
        """Learn from what a request really took; add its cost."""
        self.cost += self._cost(usage.num_prompt_tokens, usage.num_output_tokens)
        error = abs(usage.num_prompt_tokens / max(1, request.num_prompt_tokens) - 1.0)
        self._prompt_error += (min(error, 1.0) - self._prompt_error) / _USAGE_MEMORY
        self._output_length.learn(usage.num_output_tokens, request.num_sequences)

    def state(self, now_s: float) -> ProviderState:
        """Return what it costs, how fast it is and what may be sent under its keys."""
        for key in self.keys:
            key.breaker.tick(now_s)
        return ProviderState(
            models=self.settings.models,
            ttft_s=self.ttft_s,
            cost=self.cost,
            keys={
                key.name: KeyState(
                    breaker=key.breaker.state(now_s), budget=key.limiter.state(now_s)
                )
                for key in self.keys
            },
        )

    def _cost(self, num_prompt_tokens: float, num_output_tokens: float) -> float:
        """What so many tokens cost, in the currency of the prices."""
        settings = self.settings
        return _PER_MILLION * (
            settings.price_prompt * num_prompt_tokens + settings.price_output * num_output_tokens
        )
