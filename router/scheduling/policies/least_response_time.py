"""Lowest recent response time, times requests outstanding: Peak-EWMA."""

import math
import random
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from router.fleet.replica import Replica
from router.scheduling.policies.base import Policy
from router.types import Request

_DECAY_S = 10.0  # Finagle's and linkerd's default
_INITIAL_S = 0.03  # linkerd's assumption about an endpoint it has not measured


class LeastResponseTime(Policy):
    """The replica with the lowest average latency x (outstanding requests + 1).

    The average jumps up to a peak at once and comes down exponentially with
    time, observed or not, so that an engine once slow is tried again (Finagle
    `PeakEwma`, tower `peak_ewma`). As linkerd does for streams, latency is that
    of the first data of a response, not of its end.
    """

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        # Weak: what is known of a replica goes when the replica does.
        self._averages: WeakKeyDictionary[Replica, tuple[float, float]] = WeakKeyDictionary()

    def choose(self, request: Request, replicas: Sequence[Replica], now_s: float) -> Replica:
        """Return the replica of the lowest cost."""
        return min(replicas, key=lambda replica: self.cost_s(replica, now_s))

    def cost_s(self, replica: Replica, now_s: float) -> float:
        """Expected seconds for one more request there."""
        average_s, observed_s = self._averages.get(replica, (_INITIAL_S, now_s))
        return average_s * _remains(now_s - observed_s) * (replica.ledger.num_open + 1)

    def observe(self, replica: Replica, latency_s: float, now_s: float) -> None:
        """Take in one latency: a peak replaces the average, else they are mixed by age."""
        average_s, observed_s = self._averages.get(replica, (0.0, now_s))
        if latency_s < average_s:
            remains = _remains(now_s - observed_s)
            latency_s = average_s * remains + latency_s * (1.0 - remains)
        self._averages[replica] = (latency_s, now_s)


def _remains(age_s: float) -> float:
    """What is left of an average after this time, 0-1."""
    return math.exp(-max(0.0, age_s) / _DECAY_S)
