"""Highest sum of weighted scores."""

import random
from collections.abc import Collection, Sequence
from typing import ClassVar

from router.fleet.replica import Replica
from router.scheduling.policies.base import Load, Policy
from router.scheduling.policies.least_kv_usage import kv_usage
from router.scheduling.prefix_index import PrefixIndex
from router.types import Request

# The default profile of the Gateway API inference extension's endpoint picker,
# which llm-d deploys (chart `inferencepool`, default-plugins.yaml).
_QUEUE_WEIGHT = 2.0
_KV_WEIGHT = 2.0
_PREFIX_WEIGHT = 3.0


class WeightedScore(Policy):
    """The replica with the highest sum of queue, KV and prefix scores, each 0–1.

    llm-d's `queue-scorer` (waiting requests, scaled between the fewest and the most),
    `kv-cache-utilization-scorer` (1 - usage) and `prefix-cache-scorer` (share of the
    prompt's blocks sent there before). Equals are drawn at random, as by its
    `max-score-picker`. llm-d scrapes queue and usage from engines; here they are live and
    count what is booked.
    """

    name: ClassVar[str] = "weighted_score"
    wants_prefix = True

    def __init__(self, rng: random.Random, ablated: Collection[str] = ()) -> None:
        super().__init__(rng, ablated)
        self._index = PrefixIndex()

    def choose(
        self, request: Request, replicas: Sequence[Replica], load: Load, now_s: float
    ) -> Replica:
        """Return a replica of the highest score."""
        queues = [_num_waiting(replica) for replica in replicas]
        fewest, most = min(queues), max(queues)

        def badness(replica: Replica) -> tuple[float]:
            queue = (most - _num_waiting(replica)) / (most - fewest) if most > fewest else 1.0
            kv = max(0.0, 1.0 - kv_usage(replica))
            prefix = self._index.match_share(request, replica)
            return (-(_QUEUE_WEIGHT * queue + _KV_WEIGHT * kv + _PREFIX_WEIGHT * prefix),)

        chosen = self.draw_lowest(replicas, badness)
        self._index.add(request, chosen)
        return chosen


def _num_waiting(replica: Replica) -> int:
    """Return the requests waiting in the engine's scheduler, and sequences on their way to it."""
    return replica.snapshot.num_waiting_reqs + replica.ledger.num_sequences
