"""Which engines of those that should get work have room for a request, and which has the most?"""

import math
from bisect import bisect_left, insort

from router.fleet.replica import Replica

# Where no more than one of so many engines has room, these are picked out and put in order;
# else all are looked at, which needs no order.
_FEW = 8


class Roster:
    """Engines in the order in which they came, and by the KV room that they were filed with.

    Sorted arrays: an engine is found by bisection, and what moves behind it are eight bytes per
    engine, which for thousands of engines is less than one level of a tree costs. A decision
    looks only at engines that it could choose.
    """

    __slots__ = (
        "_by_number",
        "_by_room",
        "_filed",
        "_last_number",
        "_numbers",
        "most_room",
        "replicas",
    )

    def __init__(self) -> None:
        self.replicas: list[Replica] = []  # in the order in which they came; not to be changed
        self.most_room = -math.inf  # of any of them, tokens
        self._numbers: list[int] = []  # theirs, ascending
        self._last_number = 0
        self._by_number: dict[int, Replica] = {}
        self._filed: dict[str, tuple[float, int]] = {}  # room and number, by id
        self._by_room: list[tuple[float, int]] = []  # ascending

    def __len__(self) -> int:
        return len(self.replicas)

    def file(self, replica: Replica) -> None:
        """Add a replica, or file one that is here by its present room."""
        room = replica.room_tokens
        filed = self._filed.get(replica.id)
        if filed is None:
            self._last_number += 1
            number = self._last_number
            self.replicas.append(replica)
            self._numbers.append(number)
            self._by_number[number] = replica
        elif filed[0] == room:
            return
        else:
            number = filed[1]
            del self._by_room[bisect_left(self._by_room, filed)]
        self._filed[replica.id] = (room, number)
        insort(self._by_room, (room, number))
        self.most_room = self._by_room[-1][0]

    def remove(self, replica_id: str) -> None:
        """Remove a replica; one that is not here changes nothing."""
        filed = self._filed.pop(replica_id, None)
        if filed is None:
            return
        number = filed[1]
        del self._by_number[number]
        del self._by_room[bisect_left(self._by_room, filed)]
        index = bisect_left(self._numbers, number)
        del self._numbers[index], self.replicas[index]
        self.most_room = self._by_room[-1][0] if self._by_room else -math.inf

    def with_room(self, num_tokens: int) -> list[Replica]:
        """Return the replicas with room for so many tokens, in order; not to be changed."""
        first = bisect_left(self._by_room, (num_tokens,))
        if not first:
            return self.replicas
        num_found = len(self._by_room) - first
        if num_found * _FEW > len(self._by_room):
            return [each for each in self.replicas if num_tokens <= each.room_tokens]
        numbers = sorted(number for _, number in self._by_room[first:])
        return [self._by_number[number] for number in numbers]

    def most_room_beside(self, replica_id: str) -> float:
        """Return the most room of any other replica than this one, tokens; -inf if none is here."""
        by_room = self._by_room
        for index in range(len(by_room) - 1, -1, -1):
            room, number = by_room[index]
            if self._by_number[number].id != replica_id:
                return room
        return -math.inf
