"""How far off are predicted times?"""

from collections import deque

import msgspec

_WINDOW = 1000  # last predictions; a quantile of 1,000 is sure to about 1.5 % of rank
# Below this many, the median of the errors is itself unsure by a third and more.
_MIN_COMPARED = 50
# Errors are relative to what came, or to this where less came: a tenth of the shortest TTFT
# targets, so that what is less changes nothing for anybody. A reply whose tokens come all at once
# takes some microseconds, and a share of those says nothing: one such reply had an error of 595.
_MIN_TIME_S = 0.05
# Predictions after which the median is taken anew: sorting 1,000 costs 50 µs.
_REVIEW_INTERVAL = 50


class AccuracyState(msgspec.Struct, frozen=True, kw_only=True):
    """How far one kind of prediction is off; None until there is something to compare."""

    num_compared: int
    error_p50: float | None  # of the absolute error, relative to what came or to 50 ms
    error_p90: float | None
    predicted_over_actual_p50: float | None


class Accuracy:
    """Relative errors of the last predictions, in a bounded window."""

    __slots__ = ("_error_p50", "_is_due", "_num_added", "_ratios")

    def __init__(self) -> None:
        self._ratios: deque[float] = deque(maxlen=_WINDOW)  # predicted over actual; see `add`
        self._num_added = 0
        self._is_due = False  # for a review
        self._error_p50: float | None = None  # as of the last review

    @property
    def error_p50(self) -> float | None:
        """The median error as of the last review, None before the first.

        Taken by whoever asks first once it is due: most predictions' errors nobody asks for.
        """
        if self._is_due:
            self._is_due = False
            self._error_p50 = _quantile(self._errors(), 0.5)
        return self._error_p50

    def add(self, predicted_s: float, actual_s: float) -> None:
        """Compare a prediction with what came, seconds; ignore an actual time of 0.

        What is predicted per token is compared as the time of all of them.
        """
        if actual_s <= 0.0:
            return
        self._ratios.append(1.0 + (predicted_s - actual_s) / max(actual_s, _MIN_TIME_S))
        self._num_added += 1
        if self._num_added >= _MIN_COMPARED and self._num_added % _REVIEW_INTERVAL == 0:
            self._is_due = True

    def state(self) -> AccuracyState:
        """Return the quantiles of the errors in the window."""
        errors = self._errors()
        return AccuracyState(
            num_compared=len(self._ratios),
            error_p50=_quantile(errors, 0.5),
            error_p90=_quantile(errors, 0.9),
            predicted_over_actual_p50=_quantile(sorted(self._ratios), 0.5),
        )

    def _errors(self) -> list[float]:
        errors = [abs(ratio - 1.0) for ratio in self._ratios]
        errors.sort()
        return errors


def _quantile(ordered: list[float], fraction: float) -> float | None:
    """Return the value at this rank, 0-1, of an ascending list; None if it is empty."""
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))] if ordered else None
