"""Each in turn."""

import random
from collections.abc import Collection, Sequence
from typing import ClassVar

from router.fleet.replica import Replica
from router.scheduling.policies.base import Load, Policy
from router.types import Request


class RoundRobin(Policy):
    """The next replica by id after the last one chosen, then from the start.

    The default of load balancers (nginx, HAProxy, Envoy). It goes by id and not by a
    counter, so that the order stays the same while replicas come and go.
    """

    name: ClassVar[str] = "round_robin"
    reads_engines: ClassVar[bool] = False

    def __init__(self, rng: random.Random, ablated: Collection[str] = ()) -> None:
        super().__init__(rng, ablated)
        self._last_id = ""

    def choose(
        self, request: Request, replicas: Sequence[Replica], load: Load, now_s: float
    ) -> Replica:
        """Return the replica that follows the last one chosen."""
        last_id, first, following = self._last_id, replicas[0], None
        for replica in replicas:
            if replica.id < first.id:
                first = replica
            if replica.id > last_id and (following is None or replica.id < following.id):
                following = replica
        chosen = first if following is None else following
        self._last_id = chosen.id
        return chosen
