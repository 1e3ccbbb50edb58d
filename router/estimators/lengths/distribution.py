"""How are the lengths of one request's answers distributed?"""

import math

from router.estimators.lengths.error_shape import NUM_PARTS, Quantiles

# Of `Forecast.quantiles`. Two each bound the intervals of 95, 80 and 50 %.
LEVELS = (0.025, 0.1, 0.25, 0.5, 0.75, 0.9, 0.975)
_MAX_LOG_TOKENS = 12.0  # 160,000


class Distribution:
    """How log(tokens) of an answer are distributed that ends at `highest` tokens at the latest."""

    __slots__ = ("_errors", "_highest", "_mean", "_spread")

    def __init__(self, mean: float, spread: float, errors: Quantiles, highest: float) -> None:
        self._mean = mean
        self._spread = spread
        self._errors = errors  # in units of `spread`
        self._highest = highest

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Distribution):
            return NotImplemented
        return self.quantiles() == other.quantiles() and self.cut_share() == other.cut_share()

    def __hash__(self) -> int:
        return hash(self.quantiles())

    def expected_and_booked(self) -> tuple[int, int]:
        """Return the mean, and what KV room is kept for, tokens."""
        highest = self._highest
        if self._tokens(self._errors.shortest()) >= highest:  # whatever it says, it is cut
            most = max(1, round(highest))
            return most, most
        # As `_tokens`, in one go.
        top = min(_MAX_LOG_TOKENS, math.log(highest))
        mean, spread = self._mean, self._spread
        logs = [mean + spread * error for error in self._errors.parts()]
        if logs[NUM_PARTS - 1] > top:
            logs = [log if log < top else top for log in logs]
        expected = sum(map(math.exp, logs)) / NUM_PARTS
        return max(1, round(expected)), self._shown(self._errors.booked())

    def quantiles(self) -> tuple[int, ...]:
        """Return the tokens at `LEVELS`."""
        return tuple([self._shown(self._errors.at(level)) for level in LEVELS])

    def cut_share(self) -> float:
        """Return the probability that it ends at the limit."""
        lengths = [self._tokens(error) for error in self._errors.parts()]
        return sum([length >= self._highest for length in lengths]) / NUM_PARTS

    def _tokens(self, error: float) -> float:
        return math.exp(min(_MAX_LOG_TOKENS, self._mean + self._spread * error))

    def _shown(self, error: float) -> int:
        return max(1, round(min(self._highest, self._tokens(error))))
