"""Which replicas serve a model, and which of them accept work now?"""

import math
from collections.abc import Iterator

from router.estimators.request_overhead import RequestOverhead
from router.estimators.step_time import StepModel
from router.fleet.admission import ANY, SHORT_ONLY, UNAVAILABLE, Admission, admission
from router.fleet.replica import Kind, Replica
from router.fleet.roster import Roster
from router.types import Request


class _Pool:
    """Replicas that serve exactly the same names."""

    __slots__ = (
        "accepting",
        "accepting_short_only",
        "num_pending_tokens",
        "parts",
        "tokens_per_s",
        "working",
    )

    def __init__(self) -> None:
        # All that may be sent work, by id; of these, those that should be sent any now; and
        # those that should be sent what is short for them.
        self.working: dict[str, Replica] = {}
        self.accepting = Roster()
        self.accepting_short_only = Roster()
        # Sums over the working ones, and what each adds to them, by id.
        self.num_pending_tokens = 0
        self.tokens_per_s = 0.0
        self.parts: dict[str, tuple[int, float]] = {}

    def file(self, replica: Replica, is_now: Admission) -> None:
        """File a replica by what it should be sent now."""
        if is_now is ANY:
            self.accepting.file(replica)
        else:
            self.accepting.remove(replica.id)
        if is_now is SHORT_ONLY:
            self.accepting_short_only.file(replica)
        else:
            self.accepting_short_only.remove(replica.id)
        if is_now is UNAVAILABLE:
            self.working.pop(replica.id, None)
        else:
            self.working[replica.id] = replica
        self._update_sums(replica)

    def remove(self, replica: Replica) -> None:
        """Take out a replica that is gone."""
        self.file(replica, UNAVAILABLE)

    def _update_sums(self, replica: Replica) -> None:
        """Bring the sums up to date with a replica that has changed or works no longer."""
        part = self.parts.pop(replica.id, None)
        if part is not None:
            self.num_pending_tokens -= part[0]
            self.tokens_per_s -= part[1]
        if replica.id in self.working:
            part = (replica.num_pending_prefill_tokens, replica.prefill_tokens_per_s)
            self.parts[replica.id] = part
            self.num_pending_tokens += part[0]
            self.tokens_per_s += part[1]


class Fleet:
    """All replicas, and those of a model that may be sent work, or should be sent it now.

    Kept up to date per change of one replica (`refresh`), so that a decision at a saturated
    fleet costs nothing: there is no replica to look at. Pools by set of names, because an
    engine may have hundreds of names (LoRA adapters) that all change together.

    An engine that has run few steps yet is judged by what others of its kind have learned:
    by a guess that is far too slow it would never be sent a request. The overhead of requests
    outside of steps is learned from all engines of a kind together.
    """

    __slots__ = (
        "_cold",
        "_overheads",
        "_pools",
        "_pools_by_name",
        "_replicas",
        "_shared_models",
    )

    def __init__(self) -> None:
        self._replicas: dict[str, Replica] = {}
        self._pools: dict[frozenset[str], _Pool] = {}
        self._pools_by_name: dict[str, list[_Pool]] = {}
        # The step model shared last, and from how many steps it had learned then.
        self._shared_models: dict[Kind, tuple[StepModel, int]] = {}
        self._overheads: dict[Kind, RequestOverhead] = {}
        self._cold: dict[Kind, dict[str, Replica]] = {}  # have run few steps yet, by id

    def __len__(self) -> int:
        return len(self._replicas)

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._replicas.values())

    def get(self, replica_id: str) -> Replica | None:
        """Return the replica of this id, None if there is none."""
        return self._replicas.get(replica_id)

    def add(self, replica: Replica) -> None:
        """Add a replica whose id is new."""
        self._replicas[replica.id] = replica
        if replica.names not in self._pools:
            pool = self._pools[replica.names] = _Pool()
            for name in replica.names:
                self._pools_by_name.setdefault(name, []).append(pool)
        self._cold.setdefault(replica.kind, {})[replica.id] = replica
        if (shared := self._shared_models.get(replica.kind)) is not None:
            replica.start_from(shared[0])
        replica.request_overhead = self._overheads.setdefault(
            replica.kind, replica.request_overhead
        )
        self.refresh(replica)

    def remove(self, replica_id: str) -> Replica | None:
        """Remove a replica and return it; None if there is none. Its names stay known."""
        replica = self._replicas.pop(replica_id, None)
        if replica is not None:
            self._cold[replica.kind].pop(replica_id, None)
            self._pools[replica.names].remove(replica)
        return replica

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
        if self._replicas.get(replica.id) is not replica:
            return
        self._pools[replica.names].file(replica, admission(replica))

    def knows(self, model: str) -> bool:
        """Whether any replica serves this name, or did: it may be starting again."""
        return model in self._pools_by_name

    def any_works(self, model: str) -> bool:
        """Whether `working` would find any."""
        return any(pool.working for pool in self._pools_by_name.get(model, ()))

    def working(self, model: str) -> list[Replica]:
        """Return the replicas of a model that may be sent work."""
        pools = self._pools_by_name.get(model, ())
        return [replica for pool in pools for replica in pool.working.values()]

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
            if pool.working:
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
            for replica in pool.working.values():
                if not replica.max_prefill_chunk:
                    return 0.0
                num_steps = -(-num_tokens // replica.max_prefill_chunk)
                return num_steps * replica.chunk_tokens / replica.prefill_tokens_per_s
        return 0.0

    def time_to_prefill_s(self, model: str, num_tokens: int) -> float | None:
        """Return the predicted seconds until a model's engines have prefilled so many more tokens.

        After what they have already. None if none of them takes work.
        """
        any_works, num_pending_tokens, tokens_per_s = False, num_tokens, 0.0
        for pool in self._pools_by_name.get(model, ()):
            if pool.working:
                any_works = True
                num_pending_tokens += pool.num_pending_tokens
                tokens_per_s += pool.tokens_per_s
        return num_pending_tokens / tokens_per_s if any_works else None


def _most_room(roster: Roster, beside: str | None) -> float:
    return roster.most_room if beside is None else roster.most_room_beside(beside)
