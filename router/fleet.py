"""The replicas of one gateway, found by model name and by whether they take work."""

import math
from collections.abc import Iterator

from router.admission import is_open, is_open_to_short, takes_work
from router.replica import Replica


class _Pool:
    """Replicas that serve exactly the same names."""

    __slots__ = ("open", "open_to_short", "working")

    def __init__(self) -> None:
        self.working: dict[str, Replica] = {}  # may be sent work, by id
        self.open: dict[str, Replica] = {}  # should be sent work now, by id
        self.open_to_short: dict[str, Replica] = {}  # these and more: if the work is short


class Fleet:
    """All replicas, and those of a model that are working or open.

    Kept per change of one replica (`refresh`) so that a decision at a fleet
    that is full looks at nothing: there is nobody to look at. Pools by set of
    names, because an engine may have hundreds of names (LoRA adapters) that
    all open and close together.
    """

    __slots__ = ("_pools", "_pools_by_name", "_replicas")

    def __init__(self) -> None:
        self._replicas: dict[str, Replica] = {}
        self._pools: dict[frozenset[str], _Pool] = {}
        self._pools_by_name: dict[str, list[_Pool]] = {}

    def __len__(self) -> int:
        return len(self._replicas)

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._replicas.values())

    def get(self, replica_id: str) -> Replica | None:
        """The replica of this id, None if there is none."""
        return self._replicas.get(replica_id)

    def add(self, replica: Replica) -> None:
        """Take in a replica whose id is new."""
        self._replicas[replica.id] = replica
        if replica.names not in self._pools:
            pool = self._pools[replica.names] = _Pool()
            for name in replica.names:
                self._pools_by_name.setdefault(name, []).append(pool)
        self.refresh(replica)

    def remove(self, replica_id: str) -> None:
        """Forget a replica; an unknown id changes nothing. Its names stay known."""
        replica = self._replicas.pop(replica_id, None)
        if replica is not None:
            pool = self._pools[replica.names]
            pool.working.pop(replica_id, None)
            pool.open.pop(replica_id, None)
            pool.open_to_short.pop(replica_id, None)

    def refresh(self, replica: Replica) -> None:
        """File the replica by its present state; one that was removed is left alone."""
        if self._replicas.get(replica.id) is not replica:
            return
        pool = self._pools[replica.names]
        for replicas, belongs in (
            (pool.open, is_open(replica)),
            (pool.open_to_short, is_open_to_short(replica)),
            (pool.working, takes_work(replica)),
        ):
            if belongs:
                replicas[replica.id] = replica
            else:
                replicas.pop(replica.id, None)

    def knows(self, model: str) -> bool:
        """Whether any replica serves this name, or did: it may be starting again."""
        return model in self._pools_by_name

    def working(self, model: str) -> list[Replica]:
        """Replicas of a model that may be sent work."""
        pools = self._pools_by_name.get(model, ())
        return [replica for pool in pools for replica in pool.working.values()]

    def open(self, model: str, num_tokens: float = math.inf) -> list[Replica]:
        """Replicas of a model that should be sent so many new tokens now, KV room aside."""
        pools = self._pools_by_name.get(model, ())
        return [
            replica
            for pool in pools
            for replica in pool.open_to_short.values()
            if replica.id in pool.open or replica.is_short(num_tokens)
        ]

    def drain_s(self, model: str, num_tokens: int) -> float | None:
        """Predicted seconds until a model's engines have prefilled so many tokens more.

        After what they have. None if none of them takes work.
        """
        replicas = self.working(model)
        if not replicas:
            return None
        num_pending = sum(replica.num_pending_prefill_tokens for replica in replicas)
        tokens_per_s = sum(replica.prefill_tokens_per_s for replica in replicas)
        return (num_pending + num_tokens) / tokens_per_s
