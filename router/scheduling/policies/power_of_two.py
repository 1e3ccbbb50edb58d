"""The better of two random draws."""

from collections.abc import Sequence

from router.fleet.replica import Replica
from router.scheduling.policies.base import Policy
from router.types import Request


class PowerOfTwo(Policy):
    """Two replicas drawn at random; the one with fewer open requests.

    An exact minimum herds requests onto one replica while its load is known
    late; two draws do not, and come exponentially closer to balance than one
    (Mitzenmacher 2001). Ray Serve's default.
    """

    def choose(self, request: Request, replicas: Sequence[Replica], now_s: float) -> Replica:
        """Return the drawn replica with fewer open requests."""
        drawn = self.rng.sample(replicas, k=min(2, len(replicas)))
        return min(drawn, key=lambda replica: replica.ledger.num_open)
