"""Which replicas serve a model, and which of them accept work now?"""

import math
from collections.abc import Iterator

from router.estimators.adapter_load import AdapterLoads
from router.estimators.prefix_reuse import PrefixReuse
from router.estimators.request_overhead import RequestOverhead
from router.estimators.step_time import StepModel
from router.fleet.admission import ANY, SHORT_ONLY, UNAVAILABLE, Admission, admission
from router.fleet.replica import Kind, Replica
from router.fleet.roster import Candidate, Roster, Workforce
from router.types import Request


class _Pool:
    """Replicas that serve exactly the same names."""

    __slots__ = (
        "accepting",
        "accepting_short_only",
        "names",
        "num_pending_tokens",
        "tokens_per_s",
        "working",
    )

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names
        # All that may be sent work; of these, those that should be sent any now; and those that
        # should be sent what is short for them.
        self.working = Workforce()
        self.accepting = Roster()
        self.accepting_short_only = Roster()
        # Sums over the working ones.
        self.num_pending_tokens = 0
        self.tokens_per_s = 0.0

    def file(self, filed: "_Filed", is_now: Admission) -> None:
        """File a replica by what it should be sent now, and bring the sums up to date with it."""
        replica, was = filed.replica, filed.is_now
        room_tokens, num_free_tokens = replica.room_tokens, replica.num_free_kv_tokens
        has_other_room = room_tokens != filed.room_tokens
        if has_other_room or num_free_tokens != filed.num_free_kv_tokens:
            filed.room_tokens, filed.num_free_kv_tokens = room_tokens, num_free_tokens
            if was is not UNAVAILABLE:
                self.working.note_change(filed.number)
        if is_now is not was:
            filed.is_now = is_now
            if was is ANY:
                self.accepting.remove(replica.id)
            elif was is SHORT_ONLY:
                self.accepting_short_only.remove(replica.id)
            elif was is UNAVAILABLE:
                filed.number = self.working.add(replica)
            if is_now is UNAVAILABLE:
                self.working.remove(filed.number)
        if has_other_room or is_now is not was:
            if is_now is ANY:
                self.accepting.file(replica)
            elif is_now is SHORT_ONLY:
                self.accepting_short_only.file(replica)
        self.num_pending_tokens -= filed.num_pending_tokens
        self.tokens_per_s -= filed.tokens_per_s
        if is_now is UNAVAILABLE:
            filed.num_pending_tokens, filed.tokens_per_s = 0, 0.0
            return
        filed.num_pending_tokens = replica.num_pending_prefill_tokens
        filed.tokens_per_s = replica.prefill_tokens_per_s
        self.num_pending_tokens += filed.num_pending_tokens
        self.tokens_per_s += filed.tokens_per_s


class _Filed:
    """A replica, and how it was filed last."""

    __slots__ = (
        "is_now",
        "num_free_kv_tokens",
        "num_pending_tokens",
        "number",
        "pool",
        "replica",
        "room_tokens",
        "tokens_per_s",
    )

    def __init__(self, replica: Replica, pool: _Pool) -> None:
        self.replica = replica
        self.pool = pool
        self.is_now = UNAVAILABLE
        self.number = 0  # among the working ones of its pool, while it is one of them
        self.room_tokens = replica.room_tokens
        self.num_free_kv_tokens = replica.num_free_kv_tokens
        # What it adds to the pool's sums.
        self.num_pending_tokens = 0
        self.tokens_per_s = 0.0


class Fleet:
    """All replicas, and those of a model that may be sent work, or should be sent it now.

    Kept up to date per change of one replica (`refresh`), so that a decision at a saturated
    fleet costs nothing: there is no replica to look at. Pools by set of names, because an
    engine may have hundreds of names (LoRA adapters) that all change together.

    An engine that has run few steps yet is judged by what others of its kind have learned:
    by a guess that is far too slow it would never be sent a request. The overhead of requests
    outside of steps, and what loading an adapter takes, are learned from all engines of a kind
    together.
    """

    __slots__ = (
        "_adapter_loads",
        "_cold",
        "_filed",
        "_overheads",
        "_pools",
        "_pools_by_name",
        "_shared_models",
        "expected",
        "reuse",
    )

    def __init__(self) -> None:
        self.expected: frozenset[str] = frozenset()  # models that replicas will serve
        self.reuse = PrefixReuse()
        self._filed: dict[str, _Filed] = {}  # by id
        self._pools: dict[frozenset[str], _Pool] = {}
        self._pools_by_name: dict[str, list[_Pool]] = {}
        # The step model shared last, and from how many steps it had learned then.
        self._shared_models: dict[Kind, tuple[StepModel, int]] = {}
        self._overheads: dict[Kind, RequestOverhead] = {}
        self._adapter_loads: dict[Kind, AdapterLoads] = {}
        self._cold: dict[Kind, dict[str, Replica]] = {}  # have run few steps yet, by id

    def __len__(self) -> int:
        return len(self._filed)

    def __iter__(self) -> Iterator[Replica]:
        for filed in self._filed.values():
            yield filed.replica

    def get(self, replica_id: str) -> Replica | None:
        """Return the replica of this id, None if there is none."""
        filed = self._filed.get(replica_id)
        return None if filed is None else filed.replica

    def add(self, replica: Replica) -> None:
        """Add a replica whose id is new."""
        pool = self._pool(replica.names)
        replica.names = pool.names  # the very same, to see at a glance that it has not changed
        self._filed[replica.id] = _Filed(replica, pool)
        self._cold.setdefault(replica.kind, {})[replica.id] = replica
        if (shared := self._shared_models.get(replica.kind)) is not None:
            replica.start_from(shared[0])
        replica.request_overhead = self._overheads.setdefault(
            replica.kind, replica.request_overhead
        )
        if (adapters := replica.adapters) is not None:
            adapters.loads = self._adapter_loads.setdefault(replica.kind, adapters.loads)
        self.refresh(replica)

    def _pool(self, names: frozenset[str]) -> _Pool:
        """Return the pool of those that serve these names, a new one if there is none."""
        pool = self._pools.get(names)
        if pool is None:
            pool = self._pools[names] = _Pool(names)
            for name in names:
                self._pools_by_name.setdefault(name, []).append(pool)
        return pool

    def _rename(self, filed: "_Filed") -> None:
        """Have a replica among those that serve what it serves now; forget what nobody does."""
        before = filed.pool
        if filed.replica.names == before.names:
            filed.replica.names = before.names
            return
        before.file(filed, UNAVAILABLE)
        filed.pool = self._pool(filed.replica.names)
        filed.replica.names = filed.pool.names
        if any(other.pool is before for other in self._filed.values()):
            return
        del self._pools[before.names]
        for name in before.names:
            left = [pool for pool in self._pools_by_name[name] if pool is not before]
            if left:
                self._pools_by_name[name] = left
            else:
                del self._pools_by_name[name]
                self.reuse.forget(name)

    def remove(self, replica_id: str) -> Replica | None:
        """Remove a replica and return it; None if there is none. Its names stay known."""
        filed = self._filed.pop(replica_id, None)
        if filed is None:
            return None
        self._cold[filed.replica.kind].pop(replica_id, None)
        filed.pool.file(filed, UNAVAILABLE)
        return filed.replica

    def sizes(self) -> tuple[int, int, int]:
        """Return the KV tokens of all, the longest context of any, and the smallest step."""
        num_kv_tokens = longest = smallest = 0
        for filed in self._filed.values():
            info = filed.replica.info
            num_kv_tokens += info.num_kv_tokens
            longest = max(longest, info.max_model_len)
            step_tokens = info.max_num_batched_tokens
            smallest = min(smallest, step_tokens) if smallest else step_tokens
        return num_kv_tokens, longest, smallest

    def share_step_model(self, replica: Replica) -> None:
        """Let those of its kind that have run few steps yet predict by what a replica has learned.

        Unless one with as many steps has shared before: engines that start together would
        else all share with all.
        """
        model = replica.predictor
        shared = self._shared_models.get(replica.kind)
        if shared is not None and model.num_steps <= shared[1]:
            return
        self._shared_models[replica.kind] = model, model.num_steps
        cold = self._cold[replica.kind]
        for other in list(cold.values()):
            if other.predictor.is_warm:
                del cold[other.id]
            else:
                other.start_from(model)
                self.refresh(other)

    def refresh(self, replica: Replica) -> None:
        """File a replica by its present state; one that was removed changes nothing."""
        filed = self._filed.get(replica.id)
        if filed is not None and filed.replica is replica:
            if filed.pool.names is not replica.names:
                self._rename(filed)  # rare: its adapters have changed
            filed.pool.file(filed, admission(replica))

    def knows(self, model: str) -> bool:
        """Whether any replica serves this name, or did, or is to: it may be starting."""
        return model in self._pools_by_name or model in self.expected

    def any_works(self, model: str) -> bool:
        """Whether `working` would find any."""
        return any(len(pool.working) for pool in self._pools_by_name.get(model, ()))

    def working(self, model: str) -> list[Replica]:
        """Return the replicas of a model that may be sent work."""
        pools = self._pools_by_name.get(model, ())
        return [replica for pool in pools for replica in pool.working.replicas.values()]

    def readiest(self, model: str, need_tokens: int, taken: set[str]) -> Replica | None:
        """Return the working replica that lacks the least for a request, but for those `taken`.

        Of those with KV room for `need_tokens` the one with the least to prefill; else the one
        with the most free KV tokens. Of equals the one that has worked for longest.
        """
        best: Candidate | None = None
        for pool in self._pools_by_name.get(model, ()):
            found = pool.working.readiest(need_tokens, taken)
            if found is not None and (best is None or found.is_better_than(best)):
                best = found
        return None if best is None else best.replica

    def any_accepts(self, model: str, *, short: bool) -> bool:
        """Whether any replica of a model should be sent any request now, KV room aside.

        With `short`: or what is short for it.
        """
        for pool in self._pools_by_name.get(model, ()):
            if len(pool.accepting) or (short and len(pool.accepting_short_only)):
                return True
        return False

    def any_accepts_as_short(self, request: Request) -> bool:
        """Whether any that should be sent only what is short for it should be sent this request."""
        for pool in self._pools_by_name.get(request.model, ()):
            for replica in pool.accepting_short_only.replicas:
                if replica.is_short(replica.num_new_tokens(request)):
                    return True
        return False

    def most_room(self, model: str, *, short: bool, beside: str | None = None) -> float:
        """Return the most KV room of any replica that `any_accepts` looks at, tokens.

        `beside` is one that is left out. -inf if there is none.
        """
        most = -math.inf
        for pool in self._pools_by_name.get(model, ()):
            most = max(most, _most_room(pool.accepting, beside))
            if short:
                most = max(most, _most_room(pool.accepting_short_only, beside))
        return most

    def with_room(self, request: Request, num_tokens: int, *, short: bool) -> list[Replica]:
        """Return the replicas that should be sent this request now and have room for `num_tokens`.

        Those that take any, in the order in which they began to, before those for which it is
        short. The list is not to be changed.
        """
        replicas: list[Replica] = []
        for pool in self._pools_by_name.get(request.model, ()):
            found = pool.accepting.with_room(num_tokens)
            replicas = [*replicas, *found] if replicas else found
            if short and pool.accepting_short_only.most_room >= num_tokens:
                found = [
                    replica
                    for replica in pool.accepting_short_only.with_room(num_tokens)
                    if replica.is_short(replica.num_new_tokens(request))
                ]
                replicas = [*replicas, *found] if replicas else found
        return replicas

    def prefill_rate(self, model: str) -> tuple[int, float]:
        """Return how many engines of a model take work, and their prefill rate, tokens/s in all."""
        num_engines, tokens_per_s = 0, 0.0
        for pool in self._pools_by_name.get(model, ()):
            if len(pool.working):
                num_engines += len(pool.working)
                tokens_per_s += pool.tokens_per_s
        return num_engines, tokens_per_s

    def prefill_s_per_token(self, model: str) -> float:
        """Return what an engine of a model takes per prompt token, seconds; inf if none works."""
        num_engines, tokens_per_s = self.prefill_rate(model)
        return num_engines / tokens_per_s if num_engines else math.inf

    def full_steps_s(self, model: str, num_tokens: int) -> float:
        """Return the seconds of the full steps over which an engine of a model spreads a prompt.

        Where it gives no prompt more than a part of a step, others fill the rest.
        0 if no engine takes work, or a prompt gets all of a step.
        """
        for pool in self._pools_by_name.get(model, ()):
            for replica in pool.working.replicas.values():
                if not replica.info.max_prefill_chunk:
                    return 0.0
                num_steps = -(-num_tokens // replica.info.max_prefill_chunk)
                return num_steps * replica.chunk_tokens / replica.prefill_tokens_per_s
        return 0.0

    def time_to_prefill_s(self, model: str, num_tokens: int) -> float | None:
        """Return the predicted seconds until a model's engines have prefilled so many more tokens.

        Of prompts, of which as much will be cached as lately was. After what they have already.
        None if none of them takes work.
        """
        num_pending_tokens = int(num_tokens * (1.0 - self.reuse.share(model)))
        any_works, tokens_per_s = False, 0.0
        for pool in self._pools_by_name.get(model, ()):
            if len(pool.working):
                any_works = True
                num_pending_tokens += pool.num_pending_tokens
                tokens_per_s += pool.tokens_per_s
        return num_pending_tokens / tokens_per_s if any_works else None


def _most_room(roster: Roster, beside: str | None) -> float:
    return roster.most_room if beside is None else roster.most_room_beside(beside)
