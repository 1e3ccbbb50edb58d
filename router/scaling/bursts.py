"""How much more than expected comes at times? Learned from how far forecasts were off.

A distribution-free margin, as in conformal prediction (Vovk et al. 2005): what exceeded its
forecast by some factor in a share of the recent past will do so in about that share of the near
future, whatever its law. Each past window counts by the work that came in it, because a promise is
broken per request and not per second: a burst of ten times the requests counts ten times.
"""

from collections import deque

# Before anything is known: independent requests of chat's sizes, ten seconds of them at ten a
# second, exceed their mean by a half in one window of fifty.
_PRIOR = ((1.0, 0.8), (1.2, 0.15), (1.5, 0.05))  # factor, weight
_PRIOR_WINDOWS = 12.0


class Bursts:
    """The factors by which the work in each recent window exceeded what was expected of it."""

    __slots__ = ("_factors", "_num_pending", "_pending")

    def __init__(self, num_windows: int, num_pending: int) -> None:
        """Look back over so many windows; the last few do not count yet: see `forget_pending`."""
        self._factors: deque[float] = deque(maxlen=num_windows)
        self._pending: deque[float] = deque()
        self._num_pending = num_pending

    def record(self, came: float, expected: float) -> None:
        """Note how much came in a window of which so much was expected."""
        if expected <= 0.0:
            return
        self._pending.append(came / expected)
        if len(self._pending) > self._num_pending:
            self._factors.append(self._pending.popleft())

    def forget_pending(self) -> None:
        """Drop the last windows: what came in them was no excess but a new level."""
        self._pending.clear()

    def factor(self, share: float) -> float:
        """Return the factor within which at least this share of the work came, 0-1."""
        pairs = [(factor, weight * _PRIOR_WINDOWS * factor) for factor, weight in _PRIOR]
        pairs += [(factor, factor) for factor in self._factors]
        pairs.sort()
        left = (1.0 - share) * sum([weight for _, weight in pairs])
        for factor, weight in reversed(pairs):
            left -= weight
            if left < 0.0:
                return factor
        return pairs[0][0]
