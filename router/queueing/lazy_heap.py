"""Which id has the lowest key, where any id may be removed at any time?"""

import heapq
from collections.abc import Iterator

Key = tuple[float, ...]
_Entry = tuple[Key, int, str]  # equal keys: first come, first served


class LazyHeap:
    """A binary heap that keeps removed entries until they reach its top.

    `push` costs O(log n), `remove` and `head` the same amortised, k ids `in_order`
    O(k log k). The heap is rebuilt when more than half of its entries are removed ones, so
    it never has more than twice as many entries as ids (and a handful).
    """

    __slots__ = ("_entries", "_live", "_num_pushed")

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._live: dict[str, _Entry] = {}
        self._num_pushed = 0

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, id_: object) -> bool:
        return id_ in self._live

    def push(self, id_: str, key: Key) -> None:
        """Add an id that is not in the heap yet."""
        self._num_pushed += 1
        entry = (key, self._num_pushed, id_)
        self._live[id_] = entry
        heapq.heappush(self._entries, entry)

    def key(self, id_: str) -> Key:
        """Return the key of an id. Raises `KeyError` if it is not in the heap."""
        return self._live[id_][0]

    def remove(self, id_: str) -> None:
        """Remove an id; an unknown one changes nothing."""
        if self._live.pop(id_, None) is not None and len(self._entries) > 2 * len(self._live) + 16:
            self._entries = list(self._live.values())
            heapq.heapify(self._entries)

    def head(self) -> tuple[Key, str]:
        """Return the lowest key and its id. Raises `IndexError` if the heap is empty."""
        entries = self._entries
        while not self._is_live(entries[0]):
            heapq.heappop(entries)
        return entries[0][0], entries[0][2]

    def in_order(self) -> Iterator[str]:
        """Yield the ids by ascending key; do not change the heap meanwhile.

        Walks the heap as a tree, always on to the lowest entry whose parent was
        visited: k ids cost O(k log k), however many there are (Frederickson
        1993 has the bound without the logarithm).
        """
        entries, live, num_entries = self._entries, self._live, len(self._entries)
        frontier = [(entries[0], 0)] if entries else []
        while frontier:
            entry, index = heapq.heappop(frontier)
            for child in (2 * index + 1, 2 * index + 2):
                if child < num_entries:
                    heapq.heappush(frontier, (entries[child], child))
            current = live.get(entry[2])  # as `_is_live`
            if current is not None and current[1] == entry[1]:
                yield entry[2]

    def _is_live(self, entry: _Entry) -> bool:
        # Not by the id alone: it may have been removed and pushed again under another key. Nor by
        # `is`: compiled, a tuple of a fixed form has no identity.
        current = self._live.get(entry[2])
        return current is not None and current[1] == entry[1]
