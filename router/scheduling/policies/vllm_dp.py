"""What vLLM's own data parallelism does: fewest requests, and a penalty where the cache is full."""

import random
from collections.abc import Collection, Sequence
from typing import ClassVar
from weakref import WeakKeyDictionary

import msgspec

from router.fleet.replica import Life, Replica
from router.scheduling.policies.base import Load, Policy
from router.types import Request

# How often vLLM's coordinator publishes the engines' counts.
_REPORT_S = 0.1
_WAITING_WEIGHT = 6.0
_FREE_KV_SHARE = 0.5  # up to here a request that waits is no sign of a full cache


class _Counts(msgspec.Struct, frozen=True, gc=False):
    """What was published of one engine."""

    published_s: float
    num_running: int
    num_waiting: int
    kv_usage: float


class VllmDp(Policy):
    """The replica with the lowest max(in flight, waiting + running) + 6 waiting max(0, kv - 0.5).

    `vllm serve --data-parallel-size` (vLLM 0.32, `DPLBAsyncMPClient`). Its coordinator publishes
    what engines count ten times a second; what the front end itself has in flight it knows at
    once. Among equals theirs begins at another engine per front end; ours draws.
    """

    name: ClassVar[str] = "vllm_dp"

    def __init__(self, rng: random.Random, ablated: Collection[str] = ()) -> None:
        super().__init__(rng, ablated)
        # Weak: what is known of a replica goes when the replica does.
        self._counts: WeakKeyDictionary[Life, _Counts] = WeakKeyDictionary()

    def choose(
        self, request: Request, replicas: Sequence[Replica], load: Load, now_s: float
    ) -> Replica:
        """Return a replica of the lowest score."""
        return self.draw_lowest(replicas, lambda replica: (self.score(replica, now_s),))

    def score(self, replica: Replica, now_s: float) -> float:
        """Return vLLM's score of an engine, by counts that may be a report old."""
        counts = self._counts.get(replica.life)
        if counts is None or now_s - counts.published_s >= _REPORT_S:
            snapshot = replica.snapshot
            # All engines' counts are published at the same times.
            counts = self._counts[replica.life] = _Counts(
                now_s - now_s % _REPORT_S,
                snapshot.num_running_reqs,
                snapshot.num_waiting_reqs,
                snapshot.kv_cache_usage,
            )
        num_here = max(replica.ledger.num_open, counts.num_running + counts.num_waiting)
        fullness = max(0.0, counts.kv_usage - _FREE_KV_SHARE)
        return num_here + _WAITING_WEIGHT * counts.num_waiting * fullness
