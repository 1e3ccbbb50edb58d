"""Which engine is kept for whom: reservations of EASY back-filling (Lifka 1995)."""

from collections.abc import Iterator, Sequence

from router.fleet.admission import accepts_work, kv_need_tokens
from router.fleet.fleet import Fleet
from router.fleet.replica import Replica
from router.queueing.hold_queue import HoldQueue
from router.queueing.lazy_heap import Key
from router.types import Request


class Reservations:
    """Engines that take nobody promised later than who they are kept for.

    One per blocked head of a lane. A kept engine empties at the latest when all it runs
    has ended, and an empty engine has room for anything, so nobody starves.
    Which one it is does not change while the head waits, or two could take
    turns at filling up.
    """

    __slots__ = ("_fleet", "_kept", "_queue")

    def __init__(self, fleet: Fleet, queue: HoldQueue) -> None:
        self._fleet = fleet
        self._queue = queue
        self._kept: dict[str, tuple[Key, str]] = {}  # replica id: who it is kept for

    def __len__(self) -> int:
        return len(self._kept)

    def reserve(self, head: Request) -> None:
        """Keep the engine that lacks the least for `head`, unless one is kept already."""
        for replica_id, (_, holder_id) in self._kept.items():
            if holder_id == head.id:
                kept = self._fleet.get(replica_id)
                if kept is not None and accepts_work(kept):
                    return
                del self._kept[replica_id]
                break
        replicas = self.open_to(head, self._fleet.working(head.model))
        if replicas:
            need_tokens = kv_need_tokens(head)

            def readiness(replica: Replica) -> tuple[bool, int]:
                has_room = need_tokens <= replica.room_tokens
                if has_room:
                    return True, -replica.num_pending_prefill_tokens
                return False, replica.num_free_kv_tokens

            self._kept[max(replicas, key=readiness).id] = (self._queue.key(head), head.id)

    def open_to(self, request: Request, replicas: Sequence[Replica]) -> list[Replica]:
        """Those of the replicas not kept for a request that is more urgent than this one."""
        key = self._queue.key(request)
        return [
            replica
            for replica in replicas
            if (kept := self._kept.get(replica.id)) is None
            or kept[1] == request.id
            or key < kept[0]
        ]

    def is_for(self, replica: Replica, request: Request) -> bool:
        """Whether this replica is kept for this request."""
        return self._kept.get(replica.id, (None, None))[1] == request.id

    def holders(self, model: str) -> Iterator[Request]:
        """The held requests of a model that some engine is kept for."""
        for _, holder_id in self._kept.values():
            holder = self._queue.get(holder_id)
            if holder is not None and holder.model == model:
                yield holder

    def drop_lapsed(self) -> None:
        """Drop those whose holder is held no longer."""
        if self._kept:
            self._kept = {
                replica_id: kept
                for replica_id, kept in self._kept.items()
                if kept[1] in self._queue
            }

    def clear(self) -> None:
        """Drop all: the keys of one order of the queue say nothing in the other."""
        self._kept.clear()
