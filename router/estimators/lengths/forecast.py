"""What is said of an answer's length, and who says it?"""

import math

import msgspec

from router.estimators.lengths.distribution import LEVELS, Distribution
from router.types import Request


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """The length of one sequence of an answer, tokens, before it has begun."""

    num_expected_tokens: int  # the mean
    num_booked_tokens: int  # what KV room is kept for
    distribution: Distribution | None = None  # None of a source that knows no more

    @property
    def quantiles(self) -> tuple[int, ...]:
        """At `distribution.LEVELS`; none of a source that knows no more."""
        return self.distribution.quantiles() if self.distribution is not None else ()

    @property
    def cut_share(self) -> float:
        """The probability that it ends at the client's own limit."""
        return self.distribution.cut_share() if self.distribution is not None else 0.0


class Lengths:
    """A source of forecasts, which learns from what came."""

    def forecast(self, request: Request) -> Forecast:
        """Return what is to be expected; no more than the client's own limit."""
        raise NotImplementedError

    def wants(self, request: Request, now_s: float) -> bool:
        """Whether it has something to learn from an answer that ends now; asked once of each."""
        return True

    def learn(self, request: Request, num_output_tokens: int) -> None:
        """Learn from the tokens of a complete answer, all its sequences together."""
        raise NotImplementedError

    def coverage(self) -> dict[str, float]:
        """Return the share of late answers within their 80 % interval, by model, if it has one."""
        return {}


def num_more_tokens(num_expected: int, quantiles: tuple[int, ...], num_come: int) -> int:
    """Return the median of the tokens that are still to come when so many have; 0 at its end.

    By what a `Forecast` says. What is left of the distribution is above what has come (Bayes).
    Between its quantiles log(tokens) is taken to be even; beyond the last, to go on as before it.
    """
    if not quantiles:
        return max(0, num_expected - num_come)
    lengths = [math.log(each) for each in quantiles]
    passed = _level_of(math.log(max(1, num_come)), lengths)
    middle = math.exp(_length_at(passed + (1.0 - passed) / 2.0, lengths))
    return max(0, round(middle) - num_come)


def _level_of(length: float, lengths: list[float]) -> float:
    """Return the share of answers that are shorter, by quantiles at `LEVELS`."""
    if length <= lengths[0]:
        return 0.0
    for index in range(1, len(LEVELS)):
        low, high = lengths[index - 1], lengths[index]
        if length <= high:
            share = (length - low) / (high - low) if high > low else 1.0
            return LEVELS[index - 1] + share * (LEVELS[index] - LEVELS[index - 1])
    return 0.995


def _length_at(level: float, lengths: list[float]) -> float:
    """Return the log(tokens) below which this share of answers is."""
    for index in range(1, len(LEVELS)):
        if level <= LEVELS[index] or index == len(LEVELS) - 1:
            low, high = lengths[index - 1], lengths[index]
            share = (level - LEVELS[index - 1]) / (LEVELS[index] - LEVELS[index - 1])
            return low + max(0.0, share) * (high - low)
    return lengths[-1]
