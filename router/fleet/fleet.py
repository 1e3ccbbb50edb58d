"""The replicas of one gateway, found by model name and by whether they take work."""

import math
from collections.abc import Iterator

from router.estimators.request_overhead import RequestOverhead
from router.estimators.step_time import StepModel
from router.fleet.admission import Admission, admission
from router.fleet.replica import Kind, Replica
from router.types import Request


class _Pool:
    """Replicas that serve exactly the same names."""

    __slots__ = ("num_pending", "open", "open_to_short_only", "shares", "tokens_per_s", "working")

    def __init__(self) -> None:
        self.working: dict[str, Replica] = {}  # may be sent work, by id
        # Of these: what each adds to the two sums after it, tokens and tokens/s.
        self.shares: dict[str, tuple[int, float]] = {}
        self.num_pending = 0
        self.tokens_per_s = 0.0
        self.open: dict[str, Replica] = {}  # should be sent work now, by id
        self.open_to_short_only: dict[str, Replica] = {}  # these, too, if the work is short

    def count(self, replica: Replica) -> None:
        """Bring the sums up to date; a replica that works no longer is left out."""
        num_pending, tokens_per_s = self.shares.pop(replica.id, (0, 0.0))
        self.num_pending -= num_pending
        self.tokens_per_s -= tokens_per_s
        if replica.id in self.working:
            share = replica.num_pending_prefill_tokens, replica.prefill_tokens_per_s
            self.shares[replica.id] = share
            self.num_pending += share[0]
            self.tokens_per_s += share[1]


class Fleet:
    """All replicas, and those of a model that are working or open.

    Kept per change of one replica (`refresh`) so that a decision at a fleet
    that is full looks at nothing: there is nobody to look at. Pools by set of
    names, because an engine may have hundreds of names (LoRA adapters) that
    all open and close together.

    An engine that has run few steps yet is judged by what others of its kind have
    learned: by a guess that is far too slow it would never be sent any. What requests take
    outside of steps is learned of all of a kind.
    """

    __slots__ = (
        "_novices",
        "_paths",
        "_pools",
        "_pools_by_name",
        "_replicas",
        "_told",
    )

    def __init__(self) -> None:
        self._replicas: dict[str, Replica] = {}
        self._pools: dict[frozenset[str], _Pool] = {}
        self._pools_by_name: dict[str, list[_Pool]] = {}
        # The one that told last, and from how many steps it had learned then.
        self._told: dict[Kind, tuple[StepModel, int]] = {}
        self._paths: dict[Kind, RequestOverhead] = {}
        self._novices: dict[Kind, dict[str, Replica]] = {}  # have run few steps yet, by id

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
        self._novices.setdefault(replica.kind, {})[replica.id] = replica
        if (told := self._told.get(replica.kind)) is not None:
            replica.start_from(told[0])
        replica.path = self._paths.setdefault(replica.kind, replica.path)
        self.refresh(replica)

    def remove(self, replica_id: str) -> Replica | None:
        """Forget a replica and return it; None if there is none. Its names stay known."""
        replica = self._replicas.pop(replica_id, None)
        if replica is not None:
            self._novices[replica.kind].pop(replica_id, None)
            pool = self._pools[replica.names]
            for replicas in (pool.working, pool.open, pool.open_to_short_only):
                replicas.pop(replica_id, None)
            pool.count(replica)
        return replica

    def learn(self, replica: Replica) -> None:
        """Tell those of its kind that have run few steps yet what the replica has learned.

        If no other has told as much: engines that start together would else all tell all.
        """
        model = replica.predictor
        told = self._told.get(replica.kind)
        if told is not None and model.num_steps <= told[1]:
            return
        self._told[replica.kind] = model, model.num_steps
        novices = self._novices[replica.kind]
        for novice in list(novices.values()):
            if novice.predictor.is_warm:
                del novices[novice.id]
            else:
                novice.start_from(model)
                self.refresh(novice)

    def refresh(self, replica: Replica) -> None:
        """File the replica by its present state; one that was removed is left alone."""
        if self._replicas.get(replica.id) is not replica:
            return
        pool = self._pools[replica.names]
        is_now = admission(replica)
        for replicas, belongs in (
            (pool.open, is_now is Admission.ANY),
            (pool.open_to_short_only, is_now is Admission.SHORT_ONLY),
            (pool.working, is_now is not Admission.UNAVAILABLE),
        ):
            if belongs:
                replicas[replica.id] = replica
            else:
                replicas.pop(replica.id, None)
        pool.count(replica)

    def knows(self, model: str) -> bool:
        """Whether any replica serves this name, or did: it may be starting again."""
        return model in self._pools_by_name

    def working(self, model: str) -> list[Replica]:
        """Replicas of a model that may be sent work."""
        pools = self._pools_by_name.get(model, ())
        return [replica for pool in pools for replica in pool.working.values()]

    def open(self, model: str) -> list[Replica]:
        """Replicas of a model that should be sent work now, KV room aside."""
        pools = self._pools_by_name.get(model, ())
        return [replica for pool in pools for replica in pool.open.values()]

    def open_to_short(self, model: str) -> list[Replica]:
        """These, and those that should be sent what is short for them."""
        pools = self._pools_by_name.get(model, ())
        return [
            replica
            for pool in pools
            for replica in (*pool.open.values(), *pool.open_to_short_only.values())
        ]

    def is_any_open(self, model: str, *, to_short: bool) -> bool:
        """Whether `open`, or `open_to_short`, would find any."""
        pools = self._pools_by_name.get(model, ())
        return any(pool.open or (to_short and pool.open_to_short_only) for pool in pools)

    def open_to(self, request: Request) -> list[Replica]:
        """Replicas that should be sent this request now, KV room aside."""
        replicas: list[Replica] = []
        for pool in self._pools_by_name.get(request.model, ()):
            replicas += pool.open.values()
            if pool.open_to_short_only:
                replicas += [
                    replica
                    for replica in pool.open_to_short_only.values()
                    if replica.is_short(replica.num_new_tokens(request))
                ]
        return replicas

    def prefill_rate(self, model: str) -> tuple[int, float]:
        """Engines of a model that take work, and what they prefill together, tokens/s."""
        pools = [pool for pool in self._pools_by_name.get(model, ()) if pool.working]
        num_engines = sum(len(pool.working) for pool in pools)
        return num_engines, sum(pool.tokens_per_s for pool in pools)

    def prefill_s_per_token(self, model: str) -> float:
        """What a model's engines take per prompt token, seconds, on average; inf if none works."""
        num_engines, tokens_per_s = self.prefill_rate(model)
        return num_engines / tokens_per_s if num_engines else math.inf

    def full_steps_s(self, model: str, num_tokens: int) -> float:
        """Seconds of the full steps over which a prompt is spread, on one of a model's engines.

        Where an engine gives no prompt more than a part of a step, others fill the
        rest. 0 if none takes work, or a prompt gets all of a step.
        """
        for pool in self._pools_by_name.get(model, ()):
            for replica in pool.working.values():
                if not replica.max_prefill_chunk:
                    return 0.0
                num_steps = -(-num_tokens // replica.max_prefill_chunk)
                return num_steps * replica.chunk_tokens / replica.prefill_tokens_per_s
        return 0.0

    def drain_s(self, model: str, num_tokens: int) -> float | None:
        """Predicted seconds until a model's engines have prefilled so many tokens more.

        After what they have. None if none of them takes work.
        """
        pools = [pool for pool in self._pools_by_name.get(model, ()) if pool.working]
        if not pools:
            return None
        num_pending = sum(pool.num_pending for pool in pools)
        tokens_per_s = sum(pool.tokens_per_s for pool in pools)
        return (num_pending + num_tokens) / tokens_per_s
