"""Which engines have room for a request, which has the most, and which lacks the least?"""

import math
from bisect import bisect_left, insort

from router.fleet.replica import Replica

# Where no more than one of so many engines has room, or has changed, these are picked out and put
# in their place; else all are looked at.
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
        if num_found == 1:
            return [self._by_number[self._by_room[first][1]]]
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


class Candidate:
    """A replica, whether it has room for a request, and what counts among those that are alike."""

    __slots__ = ("has_room", "replica", "tokens")

    def __init__(self, replica: Replica, has_room: bool, tokens: int) -> None:
        self.replica = replica
        self.has_room = has_room
        self.tokens = tokens

    def is_better_than(self, other: "Candidate") -> bool:
        """Whether it lacks less; of equals neither does."""
        if self.has_room != other.has_room:
            return self.has_room
        return self.tokens > other.tokens


class Workforce:
    """All engines that work, in the order in which they began to, and which is the readiest.

    What it is asked for seldom is brought up to date then: every snapshot changes it, but only
    for a blocked head without a reservation an engine is looked for.
    """

    __slots__ = ("_by_free", "_by_room", "_changed", "_filed", "_last_number", "replicas")

    def __init__(self) -> None:
        self.replicas: dict[int, Replica] = {}  # by number; not to be changed
        self._last_number = 0
        self._changed: set[int] = set()  # since they were filed
        self._filed: dict[int, tuple[float, int]] = {}  # KV room and free KV tokens, by number
        self._by_room: list[tuple[float, int]] = []  # room and number, ascending
        self._by_free: list[tuple[int, int]] = []  # free tokens and the number's negative

    def __len__(self) -> int:
        return len(self.replicas)

    def add(self, replica: Replica) -> int:
        """Add a replica; return its number here."""
        self._last_number += 1
        self.replicas[self._last_number] = replica
        self._changed.add(self._last_number)
        return self._last_number

    def note_change(self, number: int) -> None:
        """Note that a replica's room has changed."""
        self._changed.add(number)

    def remove(self, number: int) -> None:
        """Remove a replica."""
        del self.replicas[number]
        self._changed.discard(number)
        self._withdraw(number)

    def readiest(self, need_tokens: int, taken: set[str]) -> Candidate | None:
        """Return the one that lacks the least, those `taken` aside: see `Fleet.readiest`."""
        self._update()
        best: Candidate | None = None
        best_number = 0
        first = bisect_left(self._by_room, (need_tokens,))
        for index in range(first, len(self._by_room)):
            number = self._by_room[index][1]
            replica = self.replicas[number]
            tokens = -replica.num_pending_prefill_tokens
            if best is not None and (
                tokens < best.tokens or (tokens == best.tokens and number > best_number)
            ):
                continue
            if replica.id not in taken:
                best, best_number = Candidate(replica, True, tokens), number
        if best is not None:
            return best
        for free_tokens, negative in reversed(self._by_free):
            replica = self.replicas[-negative]
            if replica.id not in taken:
                return Candidate(replica, False, free_tokens)
        return None

    def _update(self) -> None:
        """File anew what has changed; all, if that is much of it."""
        if len(self._changed) * _FEW > len(self.replicas):
            self._filed = {
                number: (replica.room_tokens, replica.num_free_kv_tokens)
                for number, replica in self.replicas.items()
            }
            self._by_room = sorted((room, number) for number, (room, _) in self._filed.items())
            self._by_free = sorted((free, -number) for number, (_, free) in self._filed.items())
        else:
            for number in self._changed:
                replica = self.replicas[number]
                self._withdraw(number)
                self._filed[number] = (replica.room_tokens, replica.num_free_kv_tokens)
                insort(self._by_room, (replica.room_tokens, number))
                insort(self._by_free, (replica.num_free_kv_tokens, -number))
        self._changed.clear()

    def _withdraw(self, number: int) -> None:
        filed = self._filed.pop(number, None)
        if filed is not None:
            del self._by_room[bisect_left(self._by_room, (filed[0], number))]
            del self._by_free[bisect_left(self._by_free, (filed[1], -number))]
