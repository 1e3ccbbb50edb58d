"""KV blocks of an emulated engine: leases, the prefix cache, eviction (vLLM 0.32).

vLLM keeps free blocks in one queue: those without a hash in front, behind them
the cached ones in the order of their release, each sequence's last block
first; allocation takes from the front and so evicts least recently used
prefixes, tails before heads (v1/core/block_pool.py). Here the blanks are a
count, and blocks that share one fate are one `Segment`, so that a sequence
costs its hashes and not its blocks.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence

from router.fleet.block_log import BlockLog


class Segment:
    """Blocks that are found, leased and released together.

    With a key anybody may find them. Without, they hold what only one
    sequence can ever ask for again (after a preemption), and are evicted
    block by block.
    """

    __slots__ = ("key", "num_blocks", "num_leases")

    def __init__(self, key: Hashable | None, num_blocks: int) -> None:
        self.key = key
        self.num_blocks = num_blocks
        self.num_leases = 1


class Lease:
    """The blocks of one sequence: shared segments from its start, then private blocks."""

    __slots__ = ("kept", "keys", "num_private", "shared")

    def __init__(self, keys: Sequence[Hashable]) -> None:
        self.keys = keys  # of the successive segments, as far as they have one
        self.shared: list[Segment] = []
        self.num_private = 0
        # After a release: how many shared segments came before `Segment`.
        self.kept: tuple[int, Segment] | None = None


class Hit:
    """What the cache holds of a lease's start."""

    __slots__ = ("num_blocks", "num_evictable", "own", "shared")

    def __init__(self) -> None:
        self.shared: list[Segment] = []
        self.own = 0  # private blocks of an earlier life
        self.num_blocks = 0
        self.num_evictable = 0  # of these, now counted as free


class KvCache:
    """`num_blocks` blocks; used + cached + blank = all, at any time.

    One key covers `segment_blocks` blocks: hashes of a workload may be coarser
    than blocks. Methods that allocate expect the caller to have compared with
    `num_free`.
    """

    def __init__(self, num_blocks: int, segment_blocks: int = 1) -> None:
        self.num_blocks = num_blocks
        self.segment_blocks = segment_blocks
        self.num_blank = num_blocks  # free and holding nothing
        self.num_cached = 0  # free, yet holding what may be asked for again
        self.epoch = 0  # changes whenever more might fit or be found than before
        self.log = BlockLog()  # of the segments that can be found, by keys that are numbers
        self._found: dict[Hashable, Segment] = {}
        self._twins: dict[Hashable, list[Segment]] = {}  # computed twice, side by side
        self._lru: OrderedDict[Segment, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated."""
        return self.num_blank + self.num_cached

    @property
    def num_used(self) -> int:
        """Blocks that running sequences hold, shared ones counted once."""
        return self.num_blocks - self.num_blank - self.num_cached

    def look_up(self, lease: Lease, max_blocks: int) -> Hit:
        """Return what is cached of the lease's first `max_blocks` blocks; changes nothing."""
        hit = Hit()
        size = self.segment_blocks
        for key in lease.keys:
            segment = self._found.get(key)
            if segment is None or hit.num_blocks + size > max_blocks:
                break
            hit.shared.append(segment)
            hit.num_blocks += size
            if not segment.num_leases:
                hit.num_evictable += size
        if lease.kept is not None and lease.kept[0] == len(hit.shared):
            hit.own = min(lease.kept[1].num_blocks, max_blocks - hit.num_blocks)
            hit.num_blocks += hit.own
            hit.num_evictable += hit.own
        return hit

    def adopt(self, lease: Lease, hit: Hit) -> None:
        """Lease what was found."""
        for segment in hit.shared:
            if not segment.num_leases:
                del self._lru[segment]
                self.num_cached -= segment.num_blocks
            segment.num_leases += 1
        lease.shared = hit.shared
        lease.num_private = hit.own
        if lease.kept is not None:
            segment = lease.kept[1]
            lease.kept = None
            segment.num_blocks -= hit.own
            self.num_cached -= hit.own
            if not segment.num_blocks and segment in self._lru:
                del self._lru[segment]

    def allocate_blocks(self, num_blocks: int) -> None:
        """Turn free blocks into used ones, blanks first; evicts."""
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
                segment.num_blocks = 0  # its owner may still look
            if num_blocks < 0:
                # Half a segment is no prefix any more.
                self.num_blank -= num_blocks
                return

    def extend(self, lease: Lease, num_blocks: int) -> None:
        """Give the lease so many blocks more."""
        self.allocate_blocks(num_blocks)
        lease.num_private += num_blocks

    def num_held(self, lease: Lease) -> int:
        """Blocks of the lease."""
        return len(lease.shared) * self.segment_blocks + lease.num_private

    def commit(self, lease: Lease, num_full_blocks: int) -> None:
        """Let others find the segments that the first `num_full_blocks` blocks fill."""
        size = self.segment_blocks
        end = min(len(lease.keys), num_full_blocks // size)
        for index in range(len(lease.shared), end):
            key = lease.keys[index]
            segment = Segment(key, size)
            if key in self._found:
                self._twins.setdefault(key, []).append(segment)
            else:
                self._found[key] = segment
                self.epoch += 1
                if isinstance(key, int):
                    self.log.store((key,))
            lease.shared.append(segment)
            lease.num_private -= size

    def release(self, lease: Lease, num_full_blocks: int) -> None:
        """Give all blocks back; the full ones stay cached until they are needed."""
        self.commit(lease, num_full_blocks)
        self.epoch += 1
        num_private_full = max(0, num_full_blocks - len(lease.shared) * self.segment_blocks)
        self.num_blank += lease.num_private - num_private_full
        if num_private_full:
            own = Segment(None, num_private_full)
            own.num_leases = 0
            self._cache(own)
            lease.kept = len(lease.shared), own
        for segment in reversed(lease.shared):
            segment.num_leases -= 1
            if not segment.num_leases:
                self._cache(segment)
        lease.shared = []
        lease.num_private = 0

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
