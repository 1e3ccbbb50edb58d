"""Least cost in seconds: the default."""

import random
from collections.abc import Collection, Sequence
from typing import ClassVar

from router.policies.base import Policy
from router.replica import Replica
from router.types import Request

# Costs within 5 % count as equal: a quarter of the error that predictions have
# at best, so a difference below it is noise, and following noise would send
# everything to the same one of several idle engines.
_TIE = 1.05

# The best of 128 at random is among the best 4 % of all with probability
# 1 - 0.96^128 = 0.995, so looking at thousands would gain next to nothing.
_MAX_COMPARED = 128


class Headway(Policy):
    """The replica where the request costs the least waiting, summed over all who wait.

    One number instead of weights: everything is in seconds, by rates that were
    learned from the engines (DESIGN.md, idea 2). Counting the delay of others
    is what makes the sum over all requests small and not just each one's own
    (marginal cost pricing, Pigou 1920). Without the part `externality`, each
    one's own is all that counts.
    """

    holds: ClassVar[bool] = True

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self._cost_s = cost_s

    def ablate(self, parts: Collection[str]) -> None:
        """Choose without these parts; it has `externality`."""
        self._cost_s = own_cost_s if "externality" in parts else cost_s

    def choose(self, request: Request, replicas: Sequence[Replica], now_s: float) -> Replica:
        """Return a replica of the lowest cost, a random one among equals."""
        if len(replicas) == 1:
            return replicas[0]
        if len(replicas) > _MAX_COMPARED:
            start = int(self.rng.random() * len(replicas))
            replicas = [*replicas[start:], *replicas[:start]][:_MAX_COMPARED]
        costs = [self._cost_s(request, replica, now_s) for replica in replicas]
        limit = min(costs) * _TIE
        equals = [replica for replica, cost in zip(replicas, costs, strict=True) if cost <= limit]
        return equals[int(self.rng.random() * len(equals))]


def cost_s(request: Request, replica: Replica, now_s: float) -> float:
    """Seconds waited by the request for its first token, and by others for it.

    Whatever decodes on the engine gets its next tokens later by the time the
    new tokens take to prefill, each of those requests by the same.
    """
    num_new_tokens = replica.num_new_tokens(request)
    delay_s = num_new_tokens * replica.token_s
    return replica.ttft_s(num_new_tokens, now_s) + delay_s * replica.snapshot.num_decoding_reqs


def own_cost_s(request: Request, replica: Replica, now_s: float) -> float:
    """Seconds waited by the request alone for its first token."""
    return replica.ttft_s(replica.num_new_tokens(request), now_s)
