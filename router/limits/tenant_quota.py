"""What one tenant may use, and how much of it is used: requests, tokens, concurrency.

Reservations, not counts after the fact: a request books its prompt and the
output predicted for it before it goes, and settles with what it really took.
"""

import math

import msgspec

from router.types import Usage

_MINUTE_S = 60.0
# Until a tenant's own replies have taught better: a chat answer of about 200 words.
_PRIOR_OUTPUT_TOKENS = 256.0
# About the last 30 replies count: enough for a stable mean, few enough to follow a change.
_OUTPUT_FORGETTING = 1 / 30


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """A tenant's limits; None means unlimited."""

    requests_per_min: float | None = None
    tokens_per_min: float | None = None  # prompt and output together
    max_concurrent_requests: int | None = None


class TokenBucket:
    """A bucket that holds one minute's worth and refills evenly.

    The level may go below zero, for what was taken can turn out to be more than
    was reserved; then nothing goes until the debt is paid. So over any time t
    no more than `per_min` · (1 + t / 60 s) is let through, and in the long run
    exactly the rate (the leaky bucket as a meter, ITU-T I.371; GCRA is the same
    with the level kept as a time).
    """

    __slots__ = ("_at_s", "_level", "per_min")

    def __init__(self, per_min: float, now_s: float) -> None:
        self.per_min = per_min
        self._level = per_min
        self._at_s = now_s

    def level(self, now_s: float) -> float:
        """What could be taken now; below zero while in debt."""
        if now_s > self._at_s:
            refill = (now_s - self._at_s) * self.per_min / _MINUTE_S
            self._level = min(self.per_min, self._level + refill)
            self._at_s = now_s
        return self._level

    def take(self, amount: float, now_s: float) -> None:
        """Take so much, or give back a negative amount; never refused."""
        self._level = min(self.per_min, self.level(now_s) - amount)

    def wait_s(self, amount: float, now_s: float) -> float:
        """Seconds until so much can be taken; infinite if it is more than the bucket holds."""
        if amount > self.per_min:
            return math.inf
        return max(0.0, amount - self.level(now_s)) * _MINUTE_S / self.per_min

    def resize(self, per_min: float, now_s: float) -> None:
        """Change the rate; what is used stays used."""
        used = self.per_min - self.level(now_s)
        self.per_min = per_min
        self._level = per_min - used


class Reservation(msgspec.Struct):
    """What one request has booked, until it is settled."""

    num_tokens: float
    num_sequences: int


class Exceeded(msgspec.Struct, frozen=True):
    """A request that does not fit now, and by which limit."""

    limit: str  # name of the field of `Limits`
    wait_s: float  # until it would fit; infinite if it never does


class TenantQuota:
    """One tenant's limits and what is left of them.

    `reserve` and, for every reservation, `settle` exactly once.
    """

    __slots__ = (
        "_mean_output_tokens",
        "_requests",
        "_tokens",
        "limits",
        "num_concurrent",
    )

    def __init__(self, limits: Limits, now_s: float) -> None:
        self.limits = limits
        self.num_concurrent = 0
        self._mean_output_tokens = _PRIOR_OUTPUT_TOKENS
        self._requests: TokenBucket | None = None
        self._tokens: TokenBucket | None = None
        self.change(limits, now_s)

    def change(self, limits: Limits, now_s: float) -> None:
        """Hold to other limits from now on; what runs is not touched."""
        self.limits = limits
        self._requests = _resized(self._requests, limits.requests_per_min, now_s)
        self._tokens = _resized(self._tokens, limits.tokens_per_min, now_s)

    def predict_output_tokens(self, max_output_tokens: int | None, num_sequences: int = 1) -> float:
        """Expected output: the tenant's mean so far, at most what the request allows."""
        mean = self._mean_output_tokens
        per_sequence = mean if max_output_tokens is None else min(mean, max_output_tokens)
        return per_sequence * num_sequences

    def reserve(
        self,
        num_prompt_tokens: int,
        max_output_tokens: int | None,
        num_sequences: int,
        now_s: float,
    ) -> Reservation | Exceeded:
        """Book a request if it fits all limits now; otherwise nothing changes.

        A prompt that fits the minute's tokens may go when its output, too, does
        not: then the whole minute is booked. A longer prompt never goes.
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
            self._requests.take(1.0, now_s)
        if self._tokens is not None:
            self._tokens.take(num_tokens, now_s)
        self.num_concurrent += 1
        return Reservation(num_tokens, num_sequences)

    def settle(self, reservation: Reservation, usage: Usage | None, now_s: float) -> None:
        """End a reservation with what the request took; None: with what it had booked."""
        self.num_concurrent -= 1
        if usage is None:
            return
        if self._tokens is not None:
            used = usage.num_prompt_tokens + usage.num_output_tokens
            self._tokens.take(used - reservation.num_tokens, now_s)
        if usage.num_output_tokens:
            mean = usage.num_output_tokens / reservation.num_sequences
            self._mean_output_tokens += _OUTPUT_FORGETTING * (mean - self._mean_output_tokens)

    def remaining(self, now_s: float) -> dict[str, tuple[float, float, float]]:
        """Per rate in force: limit per minute, what is left of it, seconds until all is back.

        By OpenAI's words for them: `requests` and `tokens`.
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
