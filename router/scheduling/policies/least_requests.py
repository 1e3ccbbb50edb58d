"""Fewest outstanding requests."""

from collections.abc import Sequence

from router.fleet.replica import Replica
from router.scheduling.policies.base import Policy
from router.types import Request


class LeastRequests(Policy):
    """The replica with the fewest requests this gateway has open there.

    nginx `least_conn`, HAProxy `leastconn`, vllm-router without a cache:
    requests are counted alike, whatever their size. Equals are drawn at
    random, as Envoy does.
    """

    def choose(self, request: Request, replicas: Sequence[Replica], now_s: float) -> Replica:
        """Return a replica with the fewest open requests."""
        return self.draw_lowest(replicas, lambda replica: (replica.ledger.num_open,))
