r"""How much of one rate limit is used, over any stretch of so many seconds?

    (none) --add_in_flight--> in flight --count_in_flight--> counted --one window later--> (none)
      |                           \--cancel_in_flight--> (none)         ^
      \--add_counted----------------------------------------------------/

An amount is in flight until the provider has surely counted it, which its reply proves.
Only then does it begin to age, and one window later it is gone. The provider counted it
earlier, so it left the provider's window earlier. Cause comes before effect, whatever the
delays: our sum is never below the provider's. A provider that uses token buckets or fixed
minutes admits whatever such a window admits.
"""

import math
from collections import deque

import msgspec

# Monotonic clocks of two machines differ by up to 100 ppm; ten times that.
_DRIFT = 1.001
# Amounts counted within this share of the window age as one, with the last of them. It
# bounds memory, and costs at most that share of the limit.
_ENTRY_SHARE = 1.0 / 600.0


class WindowState(msgspec.Struct, frozen=True, kw_only=True):
    """What is used of one limit."""

    used: float  # by us; requests, tokens or money
    limit: float | None  # None: no limit
    share: float  # used share of the limit; 0 without one


class WindowEntry:
    """The sum of amounts that were counted at about the same time."""

    __slots__ = ("amount", "first_s", "has_left", "last_s")

    def __init__(self, now_s: float) -> None:
        self.amount = 0.0
        self.first_s = self.last_s = now_s  # when the first and the last were counted
        self.has_left = False


class SlidingWindow:
    """One limit and what is used of it, kept as a log: nothing less is exact.

    Amounts are requests, tokens or money. All of one window have the same unit.
    """

    __slots__ = (
        "_counted",
        "_entries",
        "_foreign",
        "_foreign_s",
        "_in_flight",
        "_reported_limit",
        "limit",
        "window_s",
    )

    def __init__(self, limit: float, window_s: float) -> None:
        self.limit = limit  # what we may use; inf: no limit
        self.window_s = window_s * _DRIFT  # how long an amount stays, once counted
        self._entries: deque[WindowEntry] = deque()
        self._counted = 0.0
        self._in_flight = 0.0
        self._reported_limit = math.inf  # the provider's own, by its last report
        self._foreign = 0.0  # what others have used, or what we counted too low
        self._foreign_s = -math.inf  # when that was reported

    @property
    def used(self) -> float:
        """What we have in the window or in flight."""
        return self._in_flight + self._counted

    @property
    def effective_limit(self) -> float:
        """The lower of our limit and the provider's; a larger amount never has room."""
        return min(self.limit, self._reported_limit)

    @property
    def free(self) -> float:
        """What may be sent now; negative after a limit was lowered."""
        return min(self.limit, self._reported_limit - self._foreign) - self.used

    @property
    def used_share(self) -> float:
        """Used share of the effective limit, ≥ 0; 0 without a limit."""
        limit = self.effective_limit
        if math.isinf(limit):
            return 0.0
        return max(0.0, 1.0 - self.free / limit) if limit > 0.0 else 1.0

    def add_in_flight(self, amount: float) -> None:
        """Add an amount that is being sent."""
        self._in_flight += amount

    def cancel_in_flight(self, amount: float) -> None:
        """Remove an amount in flight that the provider never counts."""
        self._in_flight -= amount

    def clear_in_flight(self) -> None:
        """Set to zero what is in flight: nothing is, and rounding may have left a rest."""
        self._in_flight = 0.0

    def count_in_flight(self, amount: float, now_s: float) -> WindowEntry:
        """Let an amount in flight begin to age. Return the entry that it is in."""
        self._in_flight -= amount
        return self.add_counted(amount, now_s)

    def add_counted(self, amount: float, now_s: float) -> WindowEntry:
        """Add an amount that the provider has counted by now. Return the entry that it is in."""
        entry = self._entries[-1] if self._entries else None
        if entry is None or now_s - entry.first_s > self.window_s * _ENTRY_SHARE:
            entry = WindowEntry(now_s)
            self._entries.append(entry)
        entry.last_s = max(entry.last_s, now_s)
        entry.amount += amount
        self._counted += amount
        return entry

    def adjust_entry(self, entry: WindowEntry, difference: float, now_s: float) -> None:
        """Correct a counted amount. If it has left the window, add only what it grew by."""
        if not entry.has_left:
            entry.amount += difference
            self._counted += difference
        elif difference > 0.0:
            self.add_counted(difference, now_s)

    def record_report(self, limit: float, remaining: float, now_s: float) -> None:
        """Take in the provider's own count, as of a reply that came now.

        What it counts beyond our count is foreign. What is in flight may or may not be in
        its count, so the foreign part is known within bounds only; between them the last
        value stands. Without a further report it leaves after one window.
        """
        self._reported_limit = limit
        used = limit - remaining
        least, greatest = used - self._counted - self._in_flight, used - self._counted
        self._foreign = max(0.0, least, min(self._foreign, greatest))
        self._foreign_s = now_s

    def advance(self, now_s: float) -> None:
        """Drop what has left the window by now."""
        while self._entries and self._entries[0].last_s + self.window_s <= now_s:
            entry = self._entries.popleft()
            entry.has_left = True
            self._counted -= entry.amount
        if not self._entries:
            self._counted = 0.0  # no rest of rounding
        if self._foreign and now_s >= self._foreign_s + self.window_s:
            self._foreign = 0.0

    def wait_s(self, amount: float, now_s: float) -> float:
        """Seconds until there is room for the amount; inf if there never is.

        What is in flight is taken to be counted now.
        """
        if amount > self.effective_limit:
            return math.inf
        lacking = amount - self.free
        if lacking <= 0.0:
            return 0.0
        leaving = [(entry.last_s, entry.amount) for entry in self._entries]
        if self._foreign:
            leaving = sorted([*leaving, (self._foreign_s, self._foreign)])
        for counted_s, left in leaving:
            lacking -= left
            if lacking <= 0.0:
                return max(0.0, counted_s + self.window_s - now_s)
        return self.window_s

    def state(self) -> WindowState:
        """Return what is used of the limit, as of the last `advance`."""
        limit = self.effective_limit
        return WindowState(
            used=self.used,
            limit=None if math.isinf(limit) else limit,
            share=self.used_share,
        )
