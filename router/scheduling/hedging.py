"""A second engine for a request whose first token is late.

    placed --late--> placed twice --first token, from either--> placed once

Whichever answers first has the request; the other is told to stop. What makes one
engine late (a noisy neighbour, a stalled device) seldom makes two, so a few requests
more cut the tail (Dean and Barroso, "The Tail at Scale", 2013). Off by default, and
paid out of the retry budget, so that it cannot double the load where everything is late.
"""

import math

import msgspec

from router.queueing.hold_queue import HoldQueue
from router.resilience.retry_budget import RetryBudget
from router.scheduling.placer import Placement, Placer
from router.types import Hedge, Usage

# All that is open is looked at this often: what a first token may be late beside by.
_LOOK_S = 0.05
# Nobody is late whose prediction was less than this: that is what a look may miss by.
_LEAST_PREDICTED_S = _LOOK_S


class HedgingState(msgspec.Struct, frozen=True, kw_only=True):
    """How many requests had a second engine."""

    num_open: int  # that have two now
    num_made: int
    num_won: int  # that the second one answered first


class Hedges:
    """Second placements, by request."""

    def __init__(
        self, placer: Placer, queue: HoldQueue, retries: RetryBudget, factor: float | None
    ) -> None:
        """Late is a first token after `factor` times its prediction; None: nobody ever is."""
        self._placer = placer
        self._queue = queue
        self._retries = retries
        self._factor = math.inf if factor is None else factor
        self._looked_s = -math.inf
        self._seconds: dict[str, Placement] = {}
        self._had: set[str] = set()  # open requests that are not hedged again
        self.num_made = 0
        self.num_won = 0

    def next_look_s(self) -> float | None:
        """When to look; None while there is nothing to look at."""
        if math.isinf(self._factor) or not len(self._placer):
            return None
        return self._looked_s + _LOOK_S

    def look(self, now_s: float) -> list[Hedge]:
        """Place a second time whoever is late, where there is room and budget."""
        if math.isinf(self._factor) or now_s < self._looked_s + _LOOK_S:
            return []
        self._looked_s = now_s
        self._had = {request_id for request_id in self._had if request_id in self._placer}
        hedges = []
        for first in self._placer.unanswered():
            predicted_s = max(first.predicted_ttft_s, _LEAST_PREDICTED_S)
            request = first.request
            is_late = now_s - first.placed_s > self._factor * predicted_s
            # One that moved already is late for that reason.
            if not is_late or request.tried or request.id in self._had:
                continue
            found = self._placer.place_beside(first, now_s)
            if found is None:
                continue
            second, dispatch = found
            if not self._retries.try_withdraw(now_s):
                self._take_back(second)
                break
            self._had.add(request.id)
            self._seconds[request.id] = second
            self.num_made += 1
            hedges.append(Hedge(dispatch))
        return hedges

    def get(self, request_id: str) -> Placement | None:
        """The second placement of this request, None if there is none."""
        return self._seconds.get(request_id)

    def win(self, first: Placement) -> None:
        """The second one has the request from here; the first is taken back."""
        self._take_back(first)
        self._placer.put(self._seconds.pop(first.request.id))
        self.num_won += 1

    def drop(self, request_id: str) -> bool:
        """Take the second placement back, if there is one; whether there was."""
        second = self._seconds.pop(request_id, None)
        if second is None:
            return False
        self._take_back(second)
        return True

    def state(self) -> HedgingState:
        """Return the counts."""
        return HedgingState(
            num_open=len(self._seconds),
            num_made=self.num_made,
            num_won=self.num_won,
        )

    def _take_back(self, placement: Placement) -> None:
        placement.replica.breaker.release(placement.permit)  # if it had no verdict yet
        self._placer.unbook(placement)
        self._queue.settle(placement.request, Usage())
