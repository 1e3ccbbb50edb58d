"""Longest cached prefix while loads are even."""

import random
from collections.abc import Collection, Sequence
from typing import ClassVar

from router.fleet.replica import Replica
from router.scheduling.policies.base import Load, Policy
from router.scheduling.prefix_index import PrefixIndex
from router.types import Request

# Defaults of the command lines of sglang-router (now SMG) and of vllm-router:
# `--cache-threshold`, `--balance-abs-threshold`, `--balance-rel-threshold`.
_MATCH_THRESHOLD = 0.3
_BALANCE_ABS_THRESHOLD = 64
_BALANCE_REL_THRESHOLD = 1.5


class CacheAware(Policy):
    """The replica that was sent the longest prefix of the prompt, unless loads are uneven.

    `cache_aware` of sglang-router, SMG and vllm-router. It takes the replica with the
    fewest open requests if these differ by more than an absolute and a relative threshold,
    or if no replica knows more than 0.3 of the prompt (older versions: the smallest tree).
    Theirs is a radix tree of characters, ours compares whole blocks. Among equal matches
    theirs takes any, ours the least loaded.
    """

    name: ClassVar[str] = "cache_aware"
    reads_engines: ClassVar[bool] = False
    wants_prefix = True

    def __init__(self, rng: random.Random, ablated: Collection[str] = ()) -> None:
        super().__init__(rng, ablated)
        self._index = PrefixIndex()

    def choose(
        self, request: Request, replicas: Sequence[Replica], load: Load, now_s: float
    ) -> Replica:
        """Return a replica of the longest match, or one with the fewest open requests."""
        candidates = replicas
        if not _is_uneven([replica.ledger.num_open for replica in replicas]):
            shares = [self._index.match_share(request, replica) for replica in replicas]
            longest = max(shares)
            if longest > _MATCH_THRESHOLD:
                pairs = zip(replicas, shares, strict=True)
                candidates = [replica for replica, share in pairs if share == longest]
        chosen = self.draw_lowest(candidates, lambda replica: (replica.ledger.num_open,))
        self._index.add(request, chosen)
        return chosen


def _is_uneven(loads: list[int]) -> bool:
    """Whether the most open requests exceed the fewest by both thresholds."""
    lowest, highest = min(loads), max(loads)
    return highest - lowest > _BALANCE_ABS_THRESHOLD and highest > _BALANCE_REL_THRESHOLD * lowest
