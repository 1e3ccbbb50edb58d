"""Lowest use of the KV cache."""

from collections.abc import Sequence

from router.fleet.replica import Replica
from router.scheduling.policies.base import Policy
from router.types import Request


class LeastKvUsage(Policy):
    """The replica with the lowest KV cache usage; among equals, the fewest requests.

    KV use as the measure of load, as in Llumnix (OSDI 2024) and as llm-d's
    `kv-cache-utilization-scorer` has it. Here it counts what is booked, too.
    """

    def choose(self, request: Request, replicas: Sequence[Replica], now_s: float) -> Replica:
        """Return a replica of the lowest usage."""
        return self.draw_lowest(
            replicas, lambda replica: (kv_usage(replica), replica.ledger.num_open)
        )


def kv_usage(replica: Replica) -> float:
    """KV cache taken when all that is pending is prefilled, a fraction.

    0–1, and above 1 where more is pending than fits. Cached but free blocks
    are not counted, as in vLLM's `kv_cache_usage`.
    """
    return 1.0 - replica.num_free_kv_tokens / max(1, replica.info.num_kv_tokens)
