"""How are predictions off? A distribution that is kept calibrated by what comes.

Each request asks once and each answer tells once, so what an answer changes is kept to its bin, and
a quantile is looked for when it is asked for.
"""

import bisect
import itertools
import math
import operator
from typing import Final

import msgspec

# Errors in units of the usual one, by bins of a tenth; beyond the last, all in one.
_LOW: Final = -5.0
_WIDTH: Final = 0.1
_NUM_BINS: Final = 100
_MEMORY_ANSWERS: Final = 400.0
_PRIOR_WEIGHT: Final = 60.0
# Conformal: after an answer outside of the interval it widens by 4 %, inside it narrows by 1 %.
_GAIN: Final = 0.05
_INSIDE: Final = 0.8
_COVERAGE_MEMORY: Final = 200.0
# Of the mean: the middles of so many equal parts.
NUM_PARTS: Final = 20
# Room is kept for what four answers of five stay within: simulated, a quarter of the preemptions
# and more tokens a second (docs/predictor.md).
BOOKED_LEVEL: Final = 0.8
# Answers count more and more instead of older ones less; past this unit all are counted anew.
_MAX_UNIT: Final = 1e100
_PART_LEVELS = [(part + 0.5) / NUM_PARTS for part in range(NUM_PARTS)]
_MIDDLES = [_LOW + _WIDTH * (bin_ + 0.5) for bin_ in range(_NUM_BINS)]


class ErrorShapeState(msgspec.Struct, frozen=True):
    """What is kept over a restart."""

    weights: list[float]  # by bin
    width: float
    coverage: float


class Quantiles:
    """The errors, over their usual size, below which given shares of answers are.

    As they were when it was made: what is learned later changes none.
    """

    __slots__ = ("_booked", "_ends", "_parts", "_total", "_width")

    def __init__(self, weights: list[float], width: float) -> None:
        """`weights` are by bin, in any unit."""
        self._ends = list(itertools.accumulate(weights))  # weight up to the end of each bin
        self._total = self._ends[_NUM_BINS - 1]
        self._width = width
        self._parts: list[float] = []
        self._booked = math.inf

    def at(self, level: float) -> float:
        """Return the error below which this share is."""
        return self._at([level])[0]

    def shortest(self) -> float:
        """Return the error in the middle of the lowest part."""
        return self._parts[0] if self._parts else self.at(_PART_LEVELS[0])

    def parts(self) -> list[float]:
        """Return the errors in the middle of `NUM_PARTS` equal parts, ascending."""
        if not self._parts:
            self._parts = self._at(_PART_LEVELS)
        return self._parts

    def _at(self, levels: list[float]) -> list[float]:
        """Return the errors at these levels, which ascend."""
        ends, total, width = self._ends, self._total, self._width
        found, bin_ = [], 0
        for level in levels:
            wanted = level * total
            bin_ = bisect.bisect_left(ends, wanted, bin_, _NUM_BINS - 1)
            below = ends[bin_ - 1] if bin_ else 0.0
            weight = ends[bin_] - below
            inside = (wanted - below) / weight if weight > 0.0 else 0.5
            found.append(width * (_LOW + _WIDTH * (bin_ + inside)))
        return found

    def booked(self) -> float:
        """Return the error at `BOOKED_LEVEL`."""
        if self._booked == math.inf:
            self._booked = self.at(BOOKED_LEVEL)
        return self._booked


class ErrorShape:
    """A histogram of errors of log(tokens), each over its usual size.

    Answers that were cut off say only that they would have been longer: their weight is spread over
    what is above as that is known to be (Efron's self-consistency, 1967). How wide the whole is
    follows the share of answers inside of the 80 % interval (adaptive conformal inference; Gibbs
    and Candès 2021): that share comes out right in the long run whatever is asked.
    """

    def __init__(self) -> None:
        # Laplace's distribution with a mean absolute error of one, until something is learned.
        weights = [math.exp(-abs(middle)) for middle in _MIDDLES]
        total = sum(weights)
        self._weights = [_PRIOR_WEIGHT * weight / total for weight in weights]
        self._unit = 1.0  # what one answer counts now
        self.width = 1.0
        self.coverage = _INSIDE  # lately
        self._quantiles: Quantiles | None = None  # until the next answer

    def learn(self, error: float, *, is_cut: bool) -> None:
        """Count an error over its usual size; if `is_cut`, it would have been that or more."""
        quantiles = self.quantiles()
        high = quantiles.at(0.9)
        if not is_cut or error > high:
            is_inside = quantiles.at(0.1) <= error <= high
            self.width *= math.exp(_GAIN * (_INSIDE - is_inside))
            self.width = min(4.0, max(0.25, self.width))
            self.coverage += (is_inside - self.coverage) / _COVERAGE_MEMORY
        self._quantiles = None
        self._unit /= 1.0 - 1.0 / _MEMORY_ANSWERS
        first = _bin(error)
        if is_cut:
            above = self._weights[first:]
            share = 1.0 + self._unit / sum(above)
            self._weights[first:] = [share * weight for weight in above]
        else:
            self._weights[first] += self._unit
        if self._unit > _MAX_UNIT:
            self._weights, self._unit = self._in_answers(), 1.0

    def mean_above(self, error: float) -> float:
        """Return the expected error of those that are at least so high, over its usual size."""
        first = _bin(error)
        above = self._weights[first:]
        least = 1e-9 * self._unit
        # Of its own bin the middle may be below it.
        of_first = above[0] * max(0.0, error - _MIDDLES[first])
        total: float = sum(map(operator.mul, above, _MIDDLES[first:])) + of_first + least * error
        return total / (sum(above) + least)

    def quantiles(self) -> Quantiles:
        """Return where shares of the answers were until now."""
        if self._quantiles is None:
            self._quantiles = Quantiles(self._weights, self.width)
        return self._quantiles

    def state(self) -> ErrorShapeState:
        """Return what is to be kept."""
        return ErrorShapeState(self._in_answers(), self.width, self.coverage)

    def restore(self, state: ErrorShapeState) -> None:
        """Go on from what was kept; from another version's nothing is taken."""
        if len(state.weights) == _NUM_BINS and sum(state.weights) > 0.0:
            self._weights, self._unit = list(state.weights), 1.0
            self.width, self.coverage = state.width, state.coverage
            self._quantiles = None

    def _in_answers(self) -> list[float]:
        return [weight / self._unit for weight in self._weights]


def _bin(error: float) -> int:
    return min(_NUM_BINS - 1, max(0, int((error - _LOW) / _WIDTH)))
