"""The better of two random draws."""

from collections.abc import Sequence
from typing import ClassVar

from router.fleet.replica import Replica
from router.scheduling.policies.base import Load, Policy
from router.types import Request


class PowerOfTwo(Policy):
    """Two replicas drawn at random; the one with fewer open requests.

    While loads are known late, an exact minimum sends a herd of requests to one replica.
    Two draws do not, and come exponentially closer to balance than one (Mitzenmacher 2001).
    Ray Serve's default.
    """

    name: ClassVar[str] = "power_of_two"
    reads_engines: ClassVar[bool] = False

    def choose(
        self, request: Request, replicas: Sequence[Replica], load: Load, now_s: float
    ) -> Replica:
        """Return the drawn replica with fewer open requests."""
        drawn = self.rng.sample(replicas, k=min(2, len(replicas)))
        return min(drawn, key=lambda replica: replica.ledger.num_open)
