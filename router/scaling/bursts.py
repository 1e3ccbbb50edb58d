"""How much more than expected comes at times? Learned from how far forecasts were off.

A distribution-free margin, as in conformal prediction (Vovk et al. 2005): what exceeded its
forecast by so much in a share of the recent past will do so in about that share of the near
future, whatever its law. Each past window counts by the work that came in it, because a promise is
broken per request and not per second: a burst of ten times the requests counts ten times.

Excess is measured in square roots of what was expected. Independent requests scatter so, which is
why large fleets need relatively less room (square-root staffing; Halfin and Whitt 1981): what was
learned in a quiet night is then no claim to multiples of the day's fleet.
"""

import math
from collections import deque

# Before anything is known: requests of a fifth of a second of an engine's time, of chat's
# scatter, in windows of ten seconds.
_PRIOR = ((0.0, 0.5), (0.2, 0.35), (0.5, 0.15))  # excess, weight
_PRIOR_WINDOWS = 24.0


class Bursts:
    """By how much the load in each recent window exceeded what was expected of it."""

    __slots__ = ("_excesses", "_num_pending", "_pending", "_quantiles")

    def __init__(self, num_windows: int, num_pending: int) -> None:
        """Look back over so many windows; the last few do not count yet: see `forget_pending`."""
        self._excesses: deque[tuple[float, float]] = deque(maxlen=num_windows)  # and weight
        self._pending: deque[tuple[float, float]] = deque()
        self._num_pending = num_pending
        self._quantiles: dict[float, float] = {}  # by share, until another window counts

    def record(self, came: float, expected: float) -> None:
        """Note how much came in a window of which so much was expected, loads in engines."""
        if expected <= 0.0:
            return
        self._pending.append(((came - expected) / math.sqrt(expected), came))
        if len(self._pending) > self._num_pending:
            self._excesses.append(self._pending.popleft())
            self._quantiles.clear()

    def forget_pending(self) -> None:
        """Drop the last windows: what came in them was no excess but a new level."""
        self._pending.clear()

    def room(self, expected: float, share: float) -> float:
        """Return the load within which at least this share of the work will come, 0-1."""
        quantile = self._quantiles.get(share)
        if quantile is None:
            quantile = self._quantiles[share] = self._find_quantile(share)
        return expected + math.sqrt(max(0.0, expected)) * max(0.0, quantile)

    def _find_quantile(self, share: float) -> float:
        pairs = [(excess, weight * _PRIOR_WINDOWS) for excess, weight in _PRIOR]
        mean = 1.0
        if self._excesses:
            mean = sum([weight for _, weight in self._excesses]) / len(self._excesses)
        pairs += [(excess, weight / max(1e-9, mean)) for excess, weight in self._excesses]
        pairs.sort()
        left = (1.0 - share) * sum([weight for _, weight in pairs])
        for excess, weight in reversed(pairs):
            left -= weight
            if left < 0.0:
                return excess
        return pairs[0][0]
