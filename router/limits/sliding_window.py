"""What a provider counts against one limit: so much within any stretch of so many seconds.

An amount is *on its way* until the provider has surely counted it, which its
reply proves; only then does it begin to age, and a window later it is gone.
The provider counted it earlier, so there it is gone, too: by the order of cause
and effect, whatever the delays, our sum is never below theirs. Token buckets
and fixed minutes admit whatever such a window does.
"""

import math
from collections import deque

# Monotonic clocks of two machines differ by up to 100 ppm; ten times that.
_DRIFT = 1.001
# Amounts counted this close together age as one, with the last of them: bounds
# memory, and costs at most that share of the limit.
_GRAIN = 1.0 / 600.0


class Grain:
    """Amounts that were counted at about the same time."""

    __slots__ = ("amount", "first_s", "has_left", "last_s")

    def __init__(self, now_s: float) -> None:
        self.amount = 0.0
        self.first_s = self.last_s = now_s  # when the first and the last were counted
        self.has_left = False


class Window:
    """One sliding window, kept as a log: nothing less is exact."""

    __slots__ = (
        "_counted",
        "_foreign",
        "_foreign_s",
        "_grains",
        "_on_way",
        "_reported",
        "limit",
        "window_s",
    )

    def __init__(self, limit: float, window_s: float) -> None:
        self.limit = limit  # what we may have in it
        self.window_s = window_s * _DRIFT  # how long an amount stays, once counted
        self._grains: deque[Grain] = deque()
        self._counted = 0.0
        self._on_way = 0.0
        self._reported = math.inf  # the provider's own limit, by its last report
        self._foreign = 0.0  # what others have in it, or what we counted too low
        self._foreign_s = -math.inf  # when that was reported

    @property
    def ours(self) -> float:
        """What we have in the window or on its way there."""
        return self._on_way + self._counted

    @property
    def most(self) -> float:
        """The largest amount that could ever have room."""
        return min(self.limit, self._reported)

    @property
    def free(self) -> float:
        """What may be sent now; negative after a limit was lowered."""
        return min(self.limit, self._reported - self._foreign) - self.ours

    @property
    def share(self) -> float:
        """Used share of the tighter limit, ≥ 0; 0 without a limit."""
        if math.isinf(self.most):
            return 0.0
        return max(0.0, 1.0 - self.free / self.most) if self.most > 0.0 else 1.0

    def send(self, amount: float) -> None:
        """Count an amount as on its way."""
        self._on_way += amount

    def take_back(self, amount: float) -> None:
        """Forget an amount on its way that the provider never counts."""
        self._on_way -= amount

    def count(self, amount: float, now_s: float) -> Grain:
        """Let an amount on its way begin to age: the provider has counted it by now."""
        self._on_way -= amount
        return self.add(amount, now_s)

    def add(self, amount: float, now_s: float) -> Grain:
        """Count an amount that was not on its way."""
        grain = self._grains[-1] if self._grains else None
        if grain is None or now_s - grain.first_s > self.window_s * _GRAIN:
            grain = Grain(now_s)
            self._grains.append(grain)
        grain.last_s = max(grain.last_s, now_s)
        grain.amount += amount
        self._counted += amount
        return grain

    def adjust(self, grain: Grain, difference: float, now_s: float) -> None:
        """Correct an amount that was counted; if it has left already, count what it grew by."""
        if not grain.has_left:
            grain.amount += difference
            self._counted += difference
        elif difference > 0.0:
            self.add(difference, now_s)

    def report(self, limit: float, remaining: float, now_s: float) -> None:
        """Take in the provider's own count, as of a reply of now.

        What it counts beyond ours is foreign. What is on its way may or may not
        be in its count, so that is known within bounds only; between them the
        last value stands. Without a further report it leaves after a window.
        """
        self._reported = limit
        used = limit - remaining
        least, greatest = used - self._counted - self._on_way, used - self._counted
        self._foreign = max(0.0, least, min(self._foreign, greatest))
        self._foreign_s = now_s

    def advance(self, now_s: float) -> None:
        """Drop what has left the window by now."""
        while self._grains and self._grains[0].last_s + self.window_s <= now_s:
            grain = self._grains.popleft()
            grain.has_left = True
            self._counted -= grain.amount
        if not self._grains:
            self._counted = 0.0  # no rest of rounding
        if self._foreign and now_s >= self._foreign_s + self.window_s:
            self._foreign = 0.0

    def nothing_on_way(self) -> None:
        """Nothing is on its way any more: leave no rest of rounding."""
        self._on_way = 0.0

    def room_s(self, amount: float, now_s: float) -> float:
        """When there will be room for the amount, seconds from now; inf if never.

        What is on its way is taken to be counted now.
        """
        if amount > self.most:
            return math.inf
        lacking = amount - self.free
        if lacking <= 0.0:
            return 0.0
        leaving = [(grain.last_s, grain.amount) for grain in self._grains]
        if self._foreign:
            leaving = sorted([*leaving, (self._foreign_s, self._foreign)])
        for counted_s, left in leaving:
            lacking -= left
            if lacking <= 0.0:
                return max(0.0, counted_s + self.window_s - now_s)
        return self.window_s
