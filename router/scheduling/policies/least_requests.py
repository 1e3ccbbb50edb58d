"""Fewest outstanding requests."""

from collections.abc import Sequence
from typing import ClassVar

from router.fleet.replica import Replica
from router.scheduling.policies.base import Load, Policy
from router.types import Request


class LeastRequests(Policy):
    """The replica where this gateway has the fewest open requests.

    nginx `least_conn`, HAProxy `leastconn`, vllm-router without a cache. All requests
    count alike, whatever their size. Equals are drawn at random, as in Envoy.
    """

    name: ClassVar[str] = "least_requests"
    reads_engines: ClassVar[bool] = False

    def choose(
        self, request: Request, replicas: Sequence[Replica], load: Load, now_s: float
    ) -> Replica:
        """Return a replica with the fewest open requests."""
        return self.draw_lowest(replicas, lambda replica: (replica.ledger.num_open,))
