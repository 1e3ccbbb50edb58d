"""How well predicted times to first token agree with those that came."""

from collections import deque

_WINDOW = 1000  # last requests; a quantile of 1,000 is sure to about 1.5 % of rank


class Accuracy:
    """Relative errors of the last predictions, in a bounded window."""

    __slots__ = ("_ratios",)

    def __init__(self) -> None:
        self._ratios: deque[float] = deque(maxlen=_WINDOW)  # predicted over actual

    def add(self, predicted_s: float, actual_s: float) -> None:
        """Compare one prediction with what came; an actual time of 0 teaches nothing."""
        if actual_s > 0.0:
            self._ratios.append(predicted_s / actual_s)

    def state(self) -> dict[str, float | int | None]:
        """Median and p90 of the absolute relative error, median of predicted/actual.

        All None until there is something to compare.
        """
        ratios = sorted(self._ratios)
        errors = sorted(abs(ratio - 1.0) for ratio in ratios)
        return {
            "num_compared": len(ratios),
            "error_p50": _quantile(errors, 0.5),
            "error_p90": _quantile(errors, 0.9),
            "predicted_over_actual_p50": _quantile(ratios, 0.5),
        }


def _quantile(ordered: list[float], fraction: float) -> float | None:
    """The value at this rank of an ascending list, None if it is empty."""
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))] if ordered else None
