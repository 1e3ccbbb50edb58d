"""Which engine is reserved for whom, so that back-filling delays nobody for ever?"""

from collections.abc import Iterator

from router.fleet.admission import accepts_work, kv_need_tokens
from router.fleet.fleet import Fleet
from router.fleet.replica import Replica
from router.queueing.hold_queue import HoldQueue
from router.queueing.lazy_heap import Key
from router.types import Request


class Reservations:
    """Engines that take no request less urgent than the one they are reserved for.

    EASY back-filling (Lifka 1995): one reservation per model, for the first request that no
    engine has room for. A reserved engine empties at the latest when all it runs has ended,
    and an empty engine has room for anything, so nobody starves. Which engine it is does not
    change while the holder waits, or two engines could fill up alternately.
    """

    __slots__ = ("_fleet", "_queue", "_reserved")

    def __init__(self, fleet: Fleet, queue: HoldQueue) -> None:
        self._fleet = fleet
        self._queue = queue
        # By replica id: key and id of the request it is reserved for, the holder.
        self._reserved: dict[str, tuple[Key, str]] = {}

    def __len__(self) -> int:
        return len(self._reserved)

    def reserve(self, head: Request) -> None:
        """Reserve the engine that lacks the least for `head`, unless it has one already."""
        for replica_id, (_, holder_id) in self._reserved.items():
            if holder_id == head.id:
                reserved = self._fleet.get(replica_id)
                # It may have unloaded the LoRA adapter that `head` asks for.
                if reserved is not None and accepts_work(reserved) and head.model in reserved.names:
                    return
                del self._reserved[replica_id]
                break
        taken = self._taken_from(head)
        best = self._fleet.readiest(head.model, kv_need_tokens(head), taken)
        if best is not None:
            self._reserved[best.id] = (self._queue.key(head), head.id)

    def available_to(self, request: Request, replicas: list[Replica]) -> list[Replica]:
        """Return those of the replicas not reserved for a request more urgent than this one."""
        taken = self._taken_from(request)
        return [each for each in replicas if each.id not in taken] if taken else replicas

    def reserved_for(self, request: Request) -> str | None:
        """Return the id of the replica that is reserved for this request; None if none is."""
        for replica_id, (_, holder_id) in self._reserved.items():
            if holder_id == request.id:
                return replica_id
        return None

    def _taken_from(self, request: Request) -> set[str]:
        """Return the ids of the replicas reserved for requests more urgent than this one."""
        key = self._queue.key(request)
        taken = set()
        for replica_id, (holder_key, holder_id) in self._reserved.items():
            if holder_id != request.id and key >= holder_key:
                taken.add(replica_id)
        return taken

    def holders(self, model: str) -> Iterator[Request]:
        """Yield the held requests of a model that some engine is reserved for."""
        for _, holder_id in self._reserved.values():
            holder = self._queue.get(holder_id)
            if holder is not None and holder.model == model:
                yield holder

    def drop_lapsed(self) -> None:
        """Drop the reservations whose holder is held no longer."""
        if not self._reserved:
            return  # the usual case
        lapsed = []
        for replica_id, (_, holder_id) in self._reserved.items():
            if holder_id not in self._queue:
                lapsed.append(replica_id)
        for replica_id in lapsed:
            del self._reserved[replica_id]

    def clear(self) -> None:
        """Drop all reservations: keys of one order of the queue mean nothing in another."""
        self._reserved.clear()
