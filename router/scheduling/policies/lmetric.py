"""Least product of what is to prefill and of what decodes beside it."""

from collections.abc import Sequence
from typing import ClassVar

from router.fleet.replica import Replica
from router.scheduling.policies.base import Load, Policy
from router.types import Request


class LMetric(Policy):
    """The replica with the lowest (pending + new uncached tokens) × (sequences + 1).

    LMetric's product: no weights and no rates, so nothing has to be tuned or learned. The first
    factor is the prefill that the request waits for, its own included; the second the
    sequences that share the engine with it. What an engine holds of the prompt is known from its
    own reports, as for `headway`.
    """

    name: ClassVar[str] = "lmetric"
    wants_prefix = True
    wants_blocks = True

    def choose(
        self, request: Request, replicas: Sequence[Replica], load: Load, now_s: float
    ) -> Replica:
        """Return a replica of the lowest product."""

        def product(replica: Replica) -> tuple[float]:
            num_tokens = replica.num_pending_prefill_tokens + replica.num_new_tokens(request)
            return (float(num_tokens * (replica.num_sequences + 1)),)

        return self.draw_lowest(replicas, product)
