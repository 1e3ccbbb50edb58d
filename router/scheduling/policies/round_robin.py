"""Each in turn."""

import random
from collections.abc import Sequence

from router.fleet.replica import Replica
from router.scheduling.policies.base import Policy
from router.types import Request


class RoundRobin(Policy):
    """The next replica by id after the last one chosen, then from the start.

    What load balancers do by default (nginx, HAProxy, Envoy). By id and not by
    a counter, so that turns are kept while replicas come and go.
    """

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self._last_id = ""

    def choose(self, request: Request, replicas: Sequence[Replica], now_s: float) -> Replica:
        """Return the replica whose turn it is."""
        chosen = min(replicas, key=lambda replica: (replica.id <= self._last_id, replica.id))
        self._last_id = chosen.id
        return chosen
