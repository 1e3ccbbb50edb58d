"""A service elsewhere that answers what our engines cannot: its keys, prices and speed."""

import math
import random
from collections.abc import Callable, Collection

from pydantic import BaseModel, ConfigDict, Field

from router.limits.lease import LeasedBudget
from router.limits.rate_limit import Amount, RateLimiter, RateLimits
from router.resilience.breaker import Breaker, BreakerLog, BreakerSettings
from router.types import Request, Usage

MakeBudget = Callable[[str, RateLimits], RateLimiter | LeasedBudget]

_PER_MILLION = 1e-6
# First tokens over which a provider's usual time is learned: enough to even out single
# ones, few enough to follow its good and bad hours.
_TTFT_MEMORY = 20.0
# By so many mean deviations beyond the mean a reply counts as overdue: as TCP's
# retransmission timer has it (Jacobson 1988); at first half the mean (RFC 6298).
_SURE_DEVIATIONS = 4.0
# Until replies have taught better: real traffic's median answer (Azure 2023, LMSYS-Chat-1M).
_PRIOR_OUTPUT_TOKENS = 128.0
_OUTPUT_MEMORY = 50.0
# By how much a prompt's estimated size is off, as a share of it: reserved is twice that
# more, as a provider counts what it really is. Bytes per token differ by so much.
_PRIOR_PROMPT_ERROR = 0.1


class KeySettings(RateLimits):
    """One API key of a provider, and what may be sent under it."""

    name: str = Field("default", description="what the key is called in states and metrics")


class ProviderSettings(BaseModel):
    """What the router has to know of a provider."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[\w.-]+$", description="what it is called in states and metrics")
    models: dict[str, str] = Field(
        min_length=1, description="models it answers for: our name, and its own"
    )
    keys: tuple[KeySettings, ...] = Field(
        (KeySettings(),), min_length=1, description="API keys, each with limits of its own"
    )
    price_prompt: float = Field(0.0, ge=0, description="price of a million prompt tokens")
    price_output: float = Field(0.0, ge=0, description="price of a million output tokens")
    max_cost_per_request: float | None = Field(
        None, gt=0, description="requests predicted to cost more stay here"
    )
    ttft_s: float = Field(
        0.5, gt=0, description="expected time to first token, until it is learned, seconds"
    )
    continues: bool = Field(
        False,
        description="goes on with a chat's reply that another provider has begun "
        "(continue_final_message: vLLM, Headway; the same model, or the text will show it)",
    )
    breaker: BreakerSettings = BreakerSettings(max_consecutive_failures=2)


class Key:
    """A provider's key: its budget and its breaker."""

    def __init__(
        self, provider: "Provider", name: str, budget: RateLimiter | LeasedBudget, breaker: Breaker
    ) -> None:
        self.id = f"{provider.name}/{name}"
        self.name = name
        self.provider = provider
        self.budget = budget
        self.breaker = breaker


class Provider:
    """One provider as the router knows it."""

    def __init__(
        self,
        settings: ProviderSettings,
        make_budget: MakeBudget,
        rng: random.Random,
        log: BreakerLog,
        now_s: float,
    ) -> None:
        self.name = settings.name
        self.settings = settings
        self.keys: list[Key] = []
        self.ttft_s = settings.ttft_s
        self._ttft_deviation_s = settings.ttft_s / 2.0
        self._num_ttfts = 0
        self.cost = 0.0  # spent since the start, as settled
        self._num_output_tokens = _PRIOR_OUTPUT_TOKENS
        self._prompt_error = _PRIOR_PROMPT_ERROR
        self._make_budget = make_budget
        self._rng = rng
        self._log = log
        self.use(settings, now_s)

    def use(self, settings: ProviderSettings, now_s: float) -> None:
        """Go by these settings from now on; keys of the same name keep what they know."""
        known = {key.name: key for key in self.keys}
        self.settings = settings
        self.keys = []
        for key_settings in settings.keys:
            key = known.get(key_settings.name)
            if key is None:
                name = f"{self.name}/{key_settings.name}"
                breaker = Breaker(settings.breaker, self._rng, now_s, name=name, log=self._log)
                budget = self._make_budget(name, key_settings)
                key = Key(self, key_settings.name, budget, breaker)
            else:
                key.budget.use(key_settings)
            self.keys.append(key)

    def serves(self, model: str) -> bool:
        """Whether it answers for this model of ours."""
        return model in self.settings.models

    def amount(self, request: Request) -> Amount:
        """What to reserve for a request: all the output it may have, the cost it should have.

        Without a limit of the client's own, twice the usual output stands for
        the most: of exponential lengths 13 % are longer, and are settled.
        """
        usual = self._num_output_tokens
        most = request.max_output_tokens
        num_output_tokens = math.ceil(2.0 * usual) if most is None else most
        expected = usual if most is None else min(usual, most)
        num_prompt_tokens = math.ceil(request.num_prompt_tokens * (1.0 + 2.0 * self._prompt_error))
        return Amount(
            1,
            num_prompt_tokens + num_output_tokens * request.num_sequences,
            self._cost(request.num_prompt_tokens, expected * request.num_sequences),
        )

    def counted(self, request: Request, usage: Usage, limits: RateLimits) -> Amount:
        """What the provider counts for a request that has ended, by its usage.

        Of the output all that it might have had, if the client said how much
        and the provider does not return the rest.
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

    def soonest(
        self,
        amount: Amount,
        now_s: float,
        ahead: dict[str, Amount],
        but: Collection[str],
    ) -> tuple[Key, float] | None:
        """The key that has room first, and in how many seconds; None if none ever has.

        `ahead` is what others wait for, by key id; keys in `but` are left out.
        """
        best: tuple[Key, float] | None = None
        for key in self.keys:
            key.breaker.tick(now_s)
            if key.id in but or not key.breaker.admits():
                continue
            waiting = ahead.get(key.id)
            wait_s = key.budget.room_s(amount if waiting is None else amount + waiting, now_s)
            if wait_s < (math.inf if best is None else best[1]):
                best = (key, wait_s)
        return best

    @property
    def sure_ttft_s(self) -> float:
        """Within which a first token comes, all but surely, seconds."""
        return self.ttft_s + _SURE_DEVIATIONS * self._ttft_deviation_s

    def learn_ttft(self, ttft_s: float) -> None:
        """Take in how long a first token took."""
        self._num_ttfts += 1
        if self._num_ttfts == 1:
            self.ttft_s, self._ttft_deviation_s = ttft_s, ttft_s / 2.0
            return
        memory = min(self._num_ttfts, _TTFT_MEMORY)
        error_s = ttft_s - self.ttft_s
        self.ttft_s += error_s / memory
        self._ttft_deviation_s += (abs(error_s) - self._ttft_deviation_s) / memory

    def learn_usage(self, request: Request, usage: Usage) -> None:
        """Take in what a request really took."""
        self.cost += self._cost(usage.num_prompt_tokens, usage.num_output_tokens)
        error = abs(usage.num_prompt_tokens / max(1, request.num_prompt_tokens) - 1.0)
        self._prompt_error += (min(error, 1.0) - self._prompt_error) / _OUTPUT_MEMORY
        num_output_tokens = usage.num_output_tokens / request.num_sequences
        self._num_output_tokens += (num_output_tokens - self._num_output_tokens) / _OUTPUT_MEMORY

    def state(self, now_s: float) -> dict[str, object]:
        """For people to read; JSON-able, and without secrets: the router knows none."""
        for key in self.keys:
            key.breaker.tick(now_s)
        return {
            "models": self.settings.models,
            "ttft_s": self.ttft_s,
            "cost": self.cost,
            "keys": {
                key.name: {
                    "breaker": key.breaker.state(now_s),
                    "budget": key.budget.state(now_s),
                }
                for key in self.keys
            },
        }

    def _cost(self, num_prompt_tokens: float, num_output_tokens: float) -> float:
        settings = self.settings
        return _PER_MILLION * (
            settings.price_prompt * num_prompt_tokens + settings.price_output * num_output_tokens
        )
