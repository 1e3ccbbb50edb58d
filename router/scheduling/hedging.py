r"""A second engine for a request whose first token is late.

    one attempt --late--> two attempts --one answers, or one fails--> one attempt

Whichever answers first has the request; the other is told to stop. What makes one engine late
(a noisy neighbour, a stalled device) seldom makes two, so a few more requests cut the tail
(Dean and Barroso, "The Tail at Scale", 2013). Off by default, and paid out of the retry
budget, so that it cannot double the load where everything is late.
"""

import math

import msgspec

from router.resilience.retry_budget import RetryBudget
from router.scheduling.attempt import Attempt, Attempts
from router.scheduling.placer import Placer
from router.types import Dispatch, Usage, Withdraw

# All that is open is looked at this often: what a first token may be late beside by.
_LOOK_S = 0.05
# Nobody is late whose prediction was less than this: that is what a look may miss by.
_LEAST_PREDICTED_S = _LOOK_S


class HedgingState(msgspec.Struct, frozen=True, kw_only=True):
    """How many requests had a second engine."""

    num_open: int  # that have two now
    num_made: int
    num_won: int  # that the second one answered first


class Hedging:
    """Decides who gets a second attempt, and ends the attempt that is answered too late."""

    def __init__(
        self, placer: Placer, attempts: Attempts, retries: RetryBudget, factor: float | None
    ) -> None:
        """Late is a first token after `factor` times its prediction; None: never."""
        self._placer = placer
        self._attempts = attempts
        self._retries = retries
        self._factor = math.inf if factor is None else factor
        self._looked_s = -math.inf
        self._hedged: set[str] = set()  # open requests that are not hedged again
        self.num_made = 0
        self.num_won = 0

    def next_look_s(self) -> float | None:
        """Return when to look; None while there is nothing to look at."""
        if math.isinf(self._factor) or not len(self._attempts):
            return None
        return self._looked_s + _LOOK_S

    def hedge_late(self, now_s: float) -> list[Dispatch]:
        """Give whoever is late a second attempt, where there is room and budget."""
        if math.isinf(self._factor) or now_s < self._looked_s + _LOOK_S:
            return []
        self._looked_s = now_s
        self._hedged = {request_id for request_id in self._hedged if request_id in self._attempts}
        dispatches = []
        for attempt in self._attempts.unanswered():
            predicted_s = max(attempt.predicted_ttft_s, _LEAST_PREDICTED_S)
            request = attempt.request
            is_late = now_s - attempt.placed_s > self._factor * predicted_s
            # One that moved already is late for that reason.
            if not is_late or request.tried or request.id in self._hedged:
                continue
            dispatch = self._placer.place_beside(attempt, now_s)
            if dispatch is None:
                continue
            if not self._retries.try_withdraw(now_s):
                for second in self._attempts.others(attempt):
                    self._attempts.end(second, Usage())
                break
            self._hedged.add(request.id)
            self.num_made += 1
            dispatches.append(dispatch)
        return dispatches

    def withdraw_others(self, attempt: Attempt) -> list[Withdraw]:
        """End the other attempts at a request that this one answers."""
        others = self._attempts.others(attempt)
        for other in others:
            self.end_in_favour(other)
        return [Withdraw(other.request.id, other.replica.id, other.booking) for other in others]

    def end_in_favour(self, attempt: Attempt) -> None:
        """End an attempt whose request the other attempt has from here on."""
        self.num_won += attempt is self._attempts.oldest(attempt.request.id)
        self._attempts.end(attempt, Usage())

    def state(self) -> HedgingState:
        """Return the counts."""
        return HedgingState(
            num_open=self._attempts.num_hedged,
            num_made=self.num_made,
            num_won=self.num_won,
        )
