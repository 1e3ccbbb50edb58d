r"""May a tenant send a request now, by its limits of requests, tokens and concurrency?

    (none) --reserve--> reserved --end_reservation--> (none), corrected to what it took
       \--reserve: over a limit--> refused (`Exceeded`); nothing changes

Reservations, not counts after the fact: a request reserves its prompt and the output
predicted for it before it goes, and is corrected to what it really took when it ends.
What never happens: a reservation that ends twice.
"""

import math

import msgspec

from router.estimators.output_length import MeanOutputLength
from router.types import Usage

_MINUTE_S = 60.0
# Until a tenant's own replies have taught better: a chat answer of about 200 words.
_PRIOR_OUTPUT_TOKENS = 256.0
# About the last 30 replies count: enough for a stable mean, few enough to follow a change.
_OUTPUT_MEMORY = 30.0


class TenantLimits(msgspec.Struct, frozen=True, kw_only=True):
    """A tenant's limits; None means unlimited."""

    requests_per_min: float | None = None
    tokens_per_min: float | None = None  # prompt and output together
    max_concurrent_requests: int | None = None


class TokenBucket:
    """A bucket that holds one minute's worth of requests or tokens and refills evenly.

    The level may go below zero, for a request can turn out to take more than was reserved;
    then nothing goes until the debt is paid. So over any time t no more than
    `per_min` · (1 + t / 60 s) is let through, and in the long run exactly the rate (the
    leaky bucket as a meter, ITU-T I.371; GCRA is the same with the level kept as a time).
    """

    __slots__ = ("_at_s", "_level", "per_min")

    def __init__(self, per_min: float, now_s: float) -> None:
        self.per_min = per_min
        self._level = per_min
        self._at_s = now_s

    def level(self, now_s: float) -> float:
        """What could be withdrawn now; below zero while in debt."""
        if now_s > self._at_s:
            refill = (now_s - self._at_s) * self.per_min / _MINUTE_S
            self._level = min(self.per_min, self._level + refill)
            self._at_s = now_s
        return self._level

    def withdraw(self, amount: float, now_s: float) -> None:
        """Withdraw an amount, or give a negative one back; never refused."""
        self._level = min(self.per_min, self.level(now_s) - amount)

    def wait_s(self, amount: float, now_s: float) -> float:
        """Seconds until so much can be withdrawn; inf if it is more than the bucket holds."""
        if amount > self.per_min:
            return math.inf
        return max(0.0, amount - self.level(now_s)) * _MINUTE_S / self.per_min

    def resize(self, per_min: float, now_s: float) -> None:
        """Change the rate; what is used stays used."""
        used = self.per_min - self.level(now_s)
        self.per_min = per_min
        self._level = per_min - used


class Reservation(msgspec.Struct):
    """What one request has reserved, until it ends."""

    num_tokens: float
    num_sequences: int


class Exceeded(msgspec.Struct, frozen=True):
    """A request that does not fit now, and by which limit."""

    limit: str  # name of the field of `TenantLimits`
    wait_s: float  # until it would fit; inf if it never does


class TenantQuota:
    """One tenant's limits and what is left of them.

    `reserve`, and `end_reservation` exactly once for every reservation.
    """

    __slots__ = (
        "_output_length",
        "_requests",
        "_tokens",
        "limits",
        "num_concurrent",
    )

    def __init__(self, limits: TenantLimits, now_s: float) -> None:
        self.limits = limits
        self.num_concurrent = 0
        self._output_length = MeanOutputLength(_PRIOR_OUTPUT_TOKENS, _OUTPUT_MEMORY)
        self._requests: TokenBucket | None = None  # None: no limit
        self._tokens: TokenBucket | None = None
        self.use_limits(limits, now_s)

    def use_limits(self, limits: TenantLimits, now_s: float) -> None:
        """Hold to these limits from now on; what is used and reserved stays."""
        self.limits = limits
        self._requests = _resized(self._requests, limits.requests_per_min, now_s)
        self._tokens = _resized(self._tokens, limits.tokens_per_min, now_s)

    def predict_output_tokens(self, max_output_tokens: int | None, num_sequences: int = 1) -> float:
        """Expected output tokens of a request: the tenant's mean, at most what it allows."""
        return self._output_length.predict(max_output_tokens) * num_sequences

    def reserve(
        self,
        num_prompt_tokens: int,
        max_output_tokens: int | None,
        num_sequences: int,
        now_s: float,
    ) -> Reservation | Exceeded:
        """Reserve for a request. Return which limit it exceeds if it does not fit now.

        A prompt that fits the minute's tokens may go although its output does not fit as
        well: then the whole minute is reserved. A longer prompt never goes.
        """
        limits = self.limits
        if (
            limits.max_concurrent_requests is not None
            and self.num_concurrent >= limits.max_concurrent_requests
        ):
            # When one of them ends is not known here; a second is soon enough to ask again.
            return Exceeded("max_concurrent_requests", 1.0)
        num_tokens = num_prompt_tokens + self.predict_output_tokens(
            max_output_tokens, num_sequences
        )
        waits_s = []
        if self._requests is not None:
            waits_s.append((self._requests.wait_s(1.0, now_s), "requests_per_min"))
        if self._tokens is not None:
            if num_prompt_tokens <= self._tokens.per_min:
                num_tokens = min(num_tokens, self._tokens.per_min)
            waits_s.append((self._tokens.wait_s(num_tokens, now_s), "tokens_per_min"))
        if waits_s and max(waits_s)[0] > 0.0:
            wait_s, limit = max(waits_s)
            return Exceeded(limit, wait_s)
        if self._requests is not None:
            self._requests.withdraw(1.0, now_s)
        if self._tokens is not None:
            self._tokens.withdraw(num_tokens, now_s)
        self.num_concurrent += 1
        return Reservation(num_tokens, num_sequences)

    def end_reservation(self, reservation: Reservation, usage: Usage | None, now_s: float) -> None:
        """End a reservation, corrected to what the request took; None: to what it reserved."""
        self.num_concurrent -= 1
        if usage is None:
            return
        if self._tokens is not None:
            used = usage.num_prompt_tokens + usage.num_output_tokens
            self._tokens.withdraw(used - reservation.num_tokens, now_s)
        if usage.num_output_tokens:
            self._output_length.learn(usage.num_output_tokens, reservation.num_sequences)

    def remaining(self, now_s: float) -> dict[str, tuple[float, float, float]]:
        """What is left of each rate in force, by OpenAI's names: `requests`, `tokens`.

        Each is the limit per minute, what is left of it, and seconds until all of it is back.
        """
        return {
            name: (
                bucket.per_min,
                max(0.0, bucket.level(now_s)),
                bucket.wait_s(bucket.per_min, now_s),
            )
            for name, bucket in (("requests", self._requests), ("tokens", self._tokens))
            if bucket is not None
        }


def _resized(bucket: TokenBucket | None, per_min: float | None, now_s: float) -> TokenBucket | None:
    if per_min is None:
        return None
    if bucket is None:
        return TokenBucket(per_min, now_s)
    bucket.resize(per_min, now_s)
    return bucket
