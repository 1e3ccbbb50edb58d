"""How are predictions off? A distribution that is kept calibrated by what comes."""

import math

import msgspec

from router.estimators.lengths.forecast import LEVELS

# Errors in units of the usual one, by bins of a tenth; beyond the last, all in one.
_LOW, _WIDTH, _NUM_BINS = -5.0, 0.1, 100
_MEMORY_ANSWERS = 400.0
_PRIOR_WEIGHT = 60.0
# Conformal: after an answer outside of the interval it widens by 4 %, inside it narrows by 1 %.
_GAIN = 0.05
_INSIDE = 0.8
_COVERAGE_MEMORY = 200.0
# Of the mean: the middles of so many equal parts.
NUM_PARTS = 20
# Room is kept for what four answers of five stay within: simulated, a quarter of the preemptions
# and more tokens a second (docs/predictor.md).
BOOKED_LEVEL = 0.8
# What is asked for: the parts, `LEVELS`, and the booked one.
ALL_LEVELS = tuple(
    sorted([*LEVELS, BOOKED_LEVEL, *((part + 0.5) / NUM_PARTS for part in range(NUM_PARTS))])
)
_LOW_INDEX, _HIGH_INDEX = ALL_LEVELS.index(0.1), ALL_LEVELS.index(0.9)


class ErrorShapeState(msgspec.Struct, frozen=True):
    """What is kept over a restart."""

    weights: list[float]  # by bin
    width: float
    coverage: float


class ErrorShape:
    """A histogram of errors of log(tokens), each over its usual size.

    Answers that were cut off say only that they would have been longer: their weight is spread over
    what is above as that is known to be (Efron's self-consistency, 1967). How wide the whole is
    follows the share of answers inside of the 80 % interval (adaptive conformal inference; Gibbs
    and Candès 2021): that share comes out right in the long run whatever is asked.
    """

    def __init__(self) -> None:
        # Laplace's distribution with a mean absolute error of one, until something is learned.
        weights = [math.exp(-abs(_middle(bin_))) for bin_ in range(_NUM_BINS)]
        total = sum(weights)
        self._weights = [_PRIOR_WEIGHT * weight / total for weight in weights]
        self._total = _PRIOR_WEIGHT
        self.width = 1.0
        self.coverage = _INSIDE  # lately
        self._quantiles: list[float] = []  # at `ALL_LEVELS`; none: to be computed anew

    def learn(self, error: float, *, is_cut: bool) -> None:
        """Count an error over its usual size; if `is_cut`, it would have been that or more."""
        quantiles = self.quantiles()
        low, high = quantiles[_LOW_INDEX], quantiles[_HIGH_INDEX]
        if not is_cut or error > high:
            is_inside = low <= error <= high
            self.width *= math.exp(_GAIN * (_INSIDE - is_inside))
            self.width = min(4.0, max(0.25, self.width))
            self.coverage += (is_inside - self.coverage) / _COVERAGE_MEMORY
        self._quantiles = []
        keep = 1.0 - 1.0 / _MEMORY_ANSWERS
        self._weights = [keep * weight for weight in self._weights]
        self._total = keep * self._total + 1.0
        first = _bin(error)
        if not is_cut:
            self._weights[first] += 1.0
            return
        above = sum(self._weights[first:])
        for bin_ in range(first, _NUM_BINS):
            self._weights[bin_] *= 1.0 + 1.0 / above

    def mean_above(self, error: float) -> float:
        """Return the expected error of those that are at least so high, over its usual size."""
        weight, total = 1e-9, 1e-9 * error
        for bin_ in range(_bin(error), _NUM_BINS):
            weight += self._weights[bin_]
            total += self._weights[bin_] * max(error, _middle(bin_))
        return total / weight

    def quantiles(self) -> list[float]:
        """Return the errors, over their usual size, below which the shares `ALL_LEVELS` are."""
        if self._quantiles:
            return self._quantiles
        bin_, below = 0, 0.0
        for level in ALL_LEVELS:
            wanted = level * self._total
            while bin_ < _NUM_BINS - 1 and below + self._weights[bin_] < wanted:
                below += self._weights[bin_]
                bin_ += 1
            weight = self._weights[bin_]
            inside = min(1.0, (wanted - below) / weight) if weight > 0.0 else 0.5
            self._quantiles.append(self.width * (_LOW + _WIDTH * (bin_ + inside)))
        return self._quantiles

    def state(self) -> ErrorShapeState:
        """Return what is to be kept."""
        return ErrorShapeState(self._weights, self.width, self.coverage)

    def restore(self, state: ErrorShapeState) -> None:
        """Go on from what was kept; from another version's nothing is taken."""
        if len(state.weights) == _NUM_BINS and sum(state.weights) > 0.0:
            self._weights, self._total = list(state.weights), sum(state.weights)
            self.width, self.coverage = state.width, state.coverage
            self._quantiles = []


def _bin(error: float) -> int:
    return min(_NUM_BINS - 1, max(0, int((error - _LOW) / _WIDTH)))


def _middle(bin_: int) -> float:
    return _LOW + _WIDTH * (bin_ + 0.5)
