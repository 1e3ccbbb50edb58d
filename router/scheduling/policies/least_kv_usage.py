"""Lowest use of the KV cache."""

from collections.abc import Sequence
from typing import ClassVar

from router.fleet.replica import Replica
from router.scheduling.policies.base import Load, Policy
from router.types import Request


class LeastKvUsage(Policy):
    """The replica with the lowest KV cache usage; among equals, the fewest requests.

    KV usage measures load in Llumnix (OSDI 2024) and in llm-d's
    `kv-cache-utilization-scorer`. Here it also counts what is booked.
    """

    name: ClassVar[str] = "least_kv_usage"

    def choose(
        self, request: Request, replicas: Sequence[Replica], load: Load, now_s: float
    ) -> Replica:
        """Return a replica of the lowest usage."""
        return self.draw_lowest(
            replicas, lambda replica: (kv_usage(replica), replica.ledger.num_open)
        )


def kv_usage(replica: Replica) -> float:
    """Return the share of the KV cache that is taken once all pending tokens are prefilled.

    0–1, and above 1 if more is pending than fits. Cached but free blocks are not counted,
    as in vLLM's `kv_cache_usage`.
    """
    return 1.0 - replica.num_free_kv_tokens / max(1, replica.info.num_kv_tokens)
