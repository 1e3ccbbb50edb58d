"""Which KV blocks are used, cached or blank, and which are evicted next (vLLM 0.32)?

vLLM keeps free blocks in one queue: those without a hash in front, behind them the cached ones in
the order of their release, each sequence's last block first. Allocation starts at the front and so
evicts the least recently used prefixes, tails before heads (v1/core/block_pool.py). Here blank
blocks are a count, and blocks that are always found and evicted together are one `Segment`: a
sequence costs its hashes and not its blocks.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence

from router.fleet.block_log import BlockLog


class Segment:
    """Blocks that are found, referenced and released together.

    With a key every sequence can find them. Without one only the sequence that computed them can
    use them again (after a preemption), and they are evicted block by block.
    """

    __slots__ = ("key", "num_blocks", "num_refs")

    def __init__(self, key: Hashable | None, num_blocks: int) -> None:
        self.key = key
        self.num_blocks = num_blocks
        self.num_refs = 1


class BlockTable:
    """The blocks of one sequence: shared segments from its start, then private blocks."""

    __slots__ = ("kept", "keys", "num_private", "shared")

    def __init__(self, keys: Sequence[Hashable]) -> None:
        self.keys = keys  # of the successive segments that have one
        self.shared: list[Segment] = []
        self.num_private = 0
        # After a release: how many shared segments precede its private blocks, and these.
        self.kept: tuple[int, Segment] | None = None


class Hit:
    """The cached blocks with which a block table starts."""

    __slots__ = ("num_blocks", "num_evictable", "own", "shared")

    def __init__(self) -> None:
        self.shared: list[Segment] = []
        self.own = 0  # private blocks from before a preemption
        self.num_blocks = 0
        self.num_evictable = 0  # of these, now counted as free


class KvCache:
    """`num_blocks` blocks; used + cached + blank = all, at any time.

    One key covers `segment_blocks` blocks: hashes of a workload may be coarser than blocks. Callers
    compare with `num_free` before they allocate.
    """

    def __init__(self, num_blocks: int, segment_blocks: int = 1) -> None:
        self.num_blocks = num_blocks
        self.segment_blocks = segment_blocks
        self.num_blank = num_blocks  # free and empty
        self.num_cached = 0  # free, with content that may be found again
        self.epoch = 0  # changes when more may fit, or be found, than before
        self.log = BlockLog()  # of the segments that can be found and whose keys are numbers
        self._found: dict[Hashable, Segment] = {}
        self._twins: dict[Hashable, list[Segment]] = {}  # computed twice, side by side
        self._lru: OrderedDict[Segment, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated."""
        return self.num_blank + self.num_cached

    @property
    def num_used(self) -> int:
        """Blocks of running sequences, shared ones counted once."""
        return self.num_blocks - self.num_blank - self.num_cached

    def look_up(self, block_table: BlockTable, max_blocks: int) -> Hit:
        """Return which of the table's first `max_blocks` blocks are cached; change nothing."""
        hit = Hit()
        size = self.segment_blocks
        for key in block_table.keys:
            segment = self._found.get(key)
            if segment is None or hit.num_blocks + size > max_blocks:
                break
            hit.shared.append(segment)
            hit.num_blocks += size
            if not segment.num_refs:
                hit.num_evictable += size
        if block_table.kept is not None and block_table.kept[0] == len(hit.shared):
            hit.own = min(block_table.kept[1].num_blocks, max_blocks - hit.num_blocks)
            hit.num_blocks += hit.own
            hit.num_evictable += hit.own
        return hit

    def adopt(self, block_table: BlockTable, hit: Hit) -> None:
        """Put the blocks that were found into the table."""
        for segment in hit.shared:
            if not segment.num_refs:
                del self._lru[segment]
                self.num_cached -= segment.num_blocks
            segment.num_refs += 1
        block_table.shared = hit.shared
        block_table.num_private = hit.own
        if block_table.kept is not None:
            segment = block_table.kept[1]
            block_table.kept = None
            segment.num_blocks -= hit.own
            self.num_cached -= hit.own
            if not segment.num_blocks and segment in self._lru:
                del self._lru[segment]

    def allocate_blocks(self, num_blocks: int) -> None:
        """Turn free blocks into used ones: blank ones first, then evict cached ones."""
        num_blank = min(num_blocks, self.num_blank)
        self.num_blank -= num_blank
        num_blocks -= num_blank
        while num_blocks:
            segment = next(iter(self._lru))
            if segment.key is None and segment.num_blocks > num_blocks:
                segment.num_blocks -= num_blocks
                self.num_cached -= num_blocks
                return
            del self._lru[segment]
            self.num_cached -= segment.num_blocks
            num_blocks -= segment.num_blocks
            if segment.key is not None:
                self._forget(segment)
            else:
                segment.num_blocks = 0  # its sequence may still look it up
            if num_blocks < 0:
                # The rest of the segment is no whole prefix and is lost.
                self.num_blank -= num_blocks
                return

    def extend(self, block_table: BlockTable, num_blocks: int) -> None:
        """Allocate so many more blocks for the table."""
        self.allocate_blocks(num_blocks)
        block_table.num_private += num_blocks

    def num_held(self, block_table: BlockTable) -> int:
        """Return the number of blocks in the table."""
        return len(block_table.shared) * self.segment_blocks + block_table.num_private

    def commit(self, block_table: BlockTable, num_full_blocks: int) -> None:
        """Make the segments that the first `num_full_blocks` blocks fill findable for others."""
        size = self.segment_blocks
        end = min(len(block_table.keys), num_full_blocks // size)
        for index in range(len(block_table.shared), end):
            key = block_table.keys[index]
            segment = Segment(key, size)
            if key in self._found:
                self._twins.setdefault(key, []).append(segment)
            else:
                self._found[key] = segment
                self.epoch += 1
                if isinstance(key, int):
                    self.log.store((key,))
            block_table.shared.append(segment)
            block_table.num_private -= size

    def release(self, block_table: BlockTable, num_full_blocks: int) -> None:
        """Free all blocks of the table; the full ones stay cached until they are evicted."""
        self.commit(block_table, num_full_blocks)
        self.epoch += 1
        num_private_full = max(0, num_full_blocks - len(block_table.shared) * self.segment_blocks)
        self.num_blank += block_table.num_private - num_private_full
        if num_private_full:
            own = Segment(None, num_private_full)
            own.num_refs = 0
            self._cache(own)
            block_table.kept = len(block_table.shared), own
        for segment in reversed(block_table.shared):
            segment.num_refs -= 1
            if not segment.num_refs:
                self._cache(segment)
        block_table.shared = []
        block_table.num_private = 0

    def _cache(self, segment: Segment) -> None:
        self._lru[segment] = None
        self.num_cached += segment.num_blocks

    def _forget(self, segment: Segment) -> None:
        key = segment.key
        twins = self._twins.get(key)
        if self._found[key] is not segment:
            assert twins is not None
            twins.remove(segment)
        elif twins:
            self._found[key] = twins.pop(0)
        else:
            del self._found[key]
            if isinstance(key, int):
                self.log.remove((key,))
        if twins is not None and not twins:
            del self._twins[key]
