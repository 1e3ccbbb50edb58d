"""How long does an engine of this model take to start, on this hardware? As measured."""

from collections import deque

_MEMORY_STARTS = 8


class StartTimes:
    """The last starts' times; the longest of them counts, for a late engine breaks promises."""

    __slots__ = ("_guess_s", "_times_s", "_waiting_s")

    def __init__(self, guess_s: float) -> None:
        self._guess_s = guess_s
        self._times_s: deque[float] = deque(maxlen=_MEMORY_STARTS)
        self._waiting_s: deque[float] = deque()  # when those that are starting were asked for

    @property
    def usual_s(self) -> float:
        """Seconds from asking for an engine until it takes requests; a guess before the first."""
        return max(self._times_s) if self._times_s else self._guess_s

    @property
    def next_ready_s(self) -> float | None:
        """When the next engine should be ready, seconds; None while none starts."""
        return self._waiting_s[0] + self.usual_s if self._waiting_s else None

    def follow(self, num_starting: int, num_arrived: int, now_s: float) -> None:
        """Note that so many engines are starting now, and so many have become ready since.

        Those that were asked for first are taken to be ready first, and those that were asked for
        last to be given up first.
        """
        for _ in range(min(num_arrived, len(self._waiting_s))):
            self._times_s.append(max(0.0, now_s - self._waiting_s.popleft()))
        while len(self._waiting_s) > num_starting:
            self._waiting_s.pop()
        while len(self._waiting_s) < num_starting:
            self._waiting_s.append(now_s)
