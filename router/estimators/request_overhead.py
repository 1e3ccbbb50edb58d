"""How much of the time to a first token is spent outside of the engine's steps?"""

from bisect import bisect_left, insort
from collections import deque

# The median of 32 is sure to a fifth of what they scatter by, and follows a load that changes
# within seconds on a GPU.
_MEMORY = 32
# The first ones may have waited for something to be compiled.
_LEAST_KNOWN = 8


class RequestOverhead:
    """Seconds from placing a request to its first token, beyond what steps explain.

    Tokenising, the network there and back, an API layer that lags behind its engine, a step
    that was launched before the request came: 50 ms on a CPU, 20 to 900 on an H100
    (docs/gpu.md), where a step takes 7. The median of the last ones, so that a few odd ones
    count for nothing; for all engines of a kind together, so that an ailing one does not
    excuse itself. Never negative: if predictions are too late on the whole, the step times
    are at fault.
    """

    __slots__ = ("_ordered", "_overheads_s", "usual_s")

    def __init__(self) -> None:
        self.usual_s = 0.0
        self._overheads_s: deque[float] = deque()
        self._ordered: list[float] = []  # the same, ascending

    def learn(self, overhead_s: float) -> None:
        """Take in how much later a first token came than its steps explain, seconds."""
        ordered = self._ordered
        if len(ordered) == _MEMORY:
            del ordered[bisect_left(ordered, self._overheads_s.popleft())]
        self._overheads_s.append(overhead_s)
        insort(ordered, overhead_s)
        num_known = len(ordered)
        if num_known >= _LEAST_KNOWN:
            middle = ordered[num_known // 2]
            median_s = middle if num_known % 2 else (ordered[num_known // 2 - 1] + middle) / 2.0
            self.usual_s = max(0.0, median_s)
