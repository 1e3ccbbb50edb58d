"""How many requests may be sent a second time?

Retries heal single failures and multiply general ones: where every request fails, three
attempts each are three times the load. So retries are paid out of a budget that traffic fills:
at most `share` of all requests, and a few beside, or a quiet gateway could not retry its first
failure (Finagle's RetryBudget).
"""

import msgspec

from router.resilience.settings import RetryBudgetSettings


class RetryBudgetState(msgspec.Struct, frozen=True, kw_only=True):
    """What is left of the budget, and what was asked of it."""

    balance: float  # retries
    num_withdrawn: int
    num_refused: int


class RetryBudget:
    """A balance that requests and time fill, and retries empty.

    Whatever happens, between two moments `s` seconds apart that saw `n` requests there are at
    most `max_balance + share * n + reserve_per_s * s` retries.
    """

    __slots__ = ("_balance", "_now_s", "_settings", "num_refused", "num_withdrawn")

    def __init__(self, settings: RetryBudgetSettings, now_s: float) -> None:
        self.num_withdrawn = 0
        self.num_refused = 0
        self._settings = settings
        self._balance = settings.max_balance
        self._now_s = now_s

    def deposit(self) -> None:
        """Add a request's share to the balance: it has arrived."""
        self._balance = min(self._settings.max_balance, self._balance + self._settings.share)

    def try_withdraw(self, now_s: float) -> bool:
        """Pay for one retry. Return False if the balance is too low."""
        settings = self._settings
        # A clock that was set back fills nothing.
        elapsed_s = max(0.0, now_s - self._now_s)
        self._now_s = max(self._now_s, now_s)
        self._balance = min(
            settings.max_balance, self._balance + settings.reserve_per_s * elapsed_s
        )
        if self._balance < 1.0:
            self.num_refused += 1
            return False
        self._balance -= 1.0
        self.num_withdrawn += 1
        return True

    def state(self) -> RetryBudgetState:
        """Return what is left and what was asked of it."""
        return RetryBudgetState(
            balance=self._balance,
            num_withdrawn=self.num_withdrawn,
            num_refused=self.num_refused,
        )
