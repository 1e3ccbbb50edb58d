"""Which KV blocks does an engine's prefix cache hold, and what has changed since a position?"""

from collections import Counter, deque
from collections.abc import Iterable
from itertools import islice

from router.types import BlockUpdate

# Changes kept for followers. One that lags further is sent the whole set, which is
# cheaper by then: a step changes some ten to hundreds of blocks, an engine has thousands.
_MAX_CHANGES = 4096


class BlockLog:
    """The cached blocks by their hashes, and a bounded log of the last changes to them.

    Each follower (a gateway) has a position, the number of changes that it knows; -1 means
    that it knows nothing. An engine without a prefix cache leaves its log empty.

    vLLM may keep several copies of a block (requests that computed the same at
    the same time) and reports each; a block is held while it has a copy left.
    """

    def __init__(self) -> None:
        self._copies: Counter[int] = Counter()  # of what is held
        self._changes: deque[tuple[int, bool]] = deque(maxlen=_MAX_CHANGES)  # hash, is stored
        self._num_changes = 0
        self._last_clear = 0  # position below which no log helps: the cache was emptied

    @property
    def position(self) -> int:
        """Number of changes so far."""
        return self._num_changes

    def store(self, hashes: Iterable[int]) -> None:
        """Add a copy of each of these blocks."""
        for block in hashes:
            self._copies[block] += 1
            if self._copies[block] == 1:
                self._changes.append((block, True))
                self._num_changes += 1

    def remove(self, hashes: Iterable[int]) -> None:
        """Remove a copy of each of these blocks; one that is not cached changes nothing."""
        for block in hashes:
            if self._copies[block] > 1:
                self._copies[block] -= 1
            elif self._copies.pop(block, 0):
                self._changes.append((block, False))
                self._num_changes += 1

    def clear(self) -> None:
        """Remove all blocks: the engine has emptied its cache."""
        self._copies.clear()
        self._changes.clear()
        self._num_changes += 1
        self._last_clear = self._num_changes

    def since(self, position: int) -> BlockUpdate | None:
        """Return what a follower at this position has missed, None if nothing."""
        if position == self._num_changes:
            return None
        num_new = self._num_changes - position
        if position < self._last_clear or num_new > len(self._changes):
            return BlockUpdate(since=-1, until=self._num_changes, stored=list(self._copies))
        # Of several changes to one block only the last one counts.
        newest_first = list(islice(reversed(self._changes), num_new))
        last = dict(reversed(newest_first))
        return BlockUpdate(
            since=position,
            until=self._num_changes,
            stored=[block for block, is_stored in last.items() if is_stored],
            removed=[block for block, is_stored in last.items() if not is_stored],
        )
