"""How long requests are under way outside of an engine's steps."""

from collections import deque
from statistics import median

# The median of 32 is sure to a fifth of what they scatter by, and follows a load that changes
# within seconds on a GPU.
_MEMORY = 32
# The first ones may have waited for something to be compiled.
_LEAST_KNOWN = 8


class RequestOverhead:
    """Seconds from placing a request to its first token, beyond what steps explain.

    Tokenising, the ways there and back, an API layer that lags behind its engine, a step
    that was launched before the request came: 50 ms on a CPU, 20 to 900 on an H100
    (docs/gpu.md), where a step takes 7. The median of what came last, so that few odd ones
    count for nothing; for all engines of a kind together, so that an ailing one does not
    excuse itself. Never negative: what is predicted too late on the whole is the steps' fault.
    """

    __slots__ = ("_rests_s", "time_s")

    def __init__(self) -> None:
        self.time_s = 0.0
        self._rests_s: deque[float] = deque(maxlen=_MEMORY)

    def learn(self, rest_s: float) -> None:
        """Take in how much later than its steps explain a first token came, seconds."""
        self._rests_s.append(rest_s)
        if len(self._rests_s) >= _LEAST_KNOWN:
            self.time_s = max(0.0, median(self._rests_s))
