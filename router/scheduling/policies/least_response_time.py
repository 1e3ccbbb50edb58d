"""Lowest recent response time, times requests outstanding: Peak-EWMA."""

import math
import random
from collections.abc import Collection, Sequence
from typing import ClassVar
from weakref import WeakKeyDictionary

from router.fleet.replica import Life, Replica
from router.scheduling.policies.base import Load, Policy
from router.types import Request

_DECAY_S = 10.0  # Finagle's and linkerd's default
_INITIAL_S = 0.03  # linkerd's assumption about an endpoint it has not measured


class LeastResponseTime(Policy):
    """The replica with the lowest average latency × (outstanding requests + 1).

    A peak raises the average at once. It then decays exponentially with time, observed or
    not, so that an engine that was slow once is tried again (Finagle `PeakEwma`, tower
    `peak_ewma`). Latency is that of the first data of a response, not of its end, as
    linkerd measures streams.
    """

    name: ClassVar[str] = "least_response_time"
    reads_engines: ClassVar[bool] = False

    def __init__(self, rng: random.Random, ablated: Collection[str] = ()) -> None:
        super().__init__(rng, ablated)
        # Weak: what is known of a replica goes when the replica does.
        self._averages: WeakKeyDictionary[Life, tuple[float, float]] = WeakKeyDictionary()

    def choose(
        self, request: Request, replicas: Sequence[Replica], load: Load, now_s: float
    ) -> Replica:
        """Return the replica of the lowest cost."""
        return min(replicas, key=lambda replica: self.cost_s(replica, now_s))

    def cost_s(self, replica: Replica, now_s: float) -> float:
        """Return the expected latency of one more request there, seconds."""
        average_s, observed_s = self._averages.get(replica.life, (_INITIAL_S, now_s))
        return average_s * _remaining_share(now_s - observed_s) * (replica.ledger.num_open + 1)

    def observe(self, replica: Replica, latency_s: float, now_s: float) -> None:
        """Learn one latency: a peak replaces the average, else both are mixed by age."""
        average_s, observed_s = self._averages.get(replica.life, (0.0, now_s))
        if latency_s < average_s:
            remaining = _remaining_share(now_s - observed_s)
            latency_s = average_s * remaining + latency_s * (1.0 - remaining)
        self._averages[replica.life] = (latency_s, now_s)


def _remaining_share(age_s: float) -> float:
    """Return the share of an average that is left after this time, 0–1."""
    return math.exp(-max(0.0, age_s) / _DECAY_S)
