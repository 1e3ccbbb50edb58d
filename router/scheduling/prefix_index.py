"""Which replica was sent which prompt prefixes? A guess at what its cache holds."""

from bisect import bisect_left
from collections import OrderedDict
from weakref import WeakKeyDictionary

from router.fleet.replica import Life, Replica
from router.types import PREFIX_BLOCK_TOKENS, Request


class PrefixIndex:
    """Keeps the block hashes sent to each replica and forgets the least recent first.

    It keeps as many per replica as the KV cache there could hold (llm-d's auto-tuned LRU
    per server), some 200 bytes each. That is still a guess: engines also fill their caches
    with answers, evict in an order of their own, and restart.

    A block is always more recent than those that follow it in a prompt, so it is
    forgotten after them. What is known of a prompt is therefore a prefix of it.
    """

    __slots__ = ("_blocks",)

    def __init__(self) -> None:
        # Weak: what is known of a replica goes when the replica does.
        self._blocks: WeakKeyDictionary[Life, OrderedDict[int, None]] = WeakKeyDictionary()

    def num_blocks(self, replica: Replica) -> int:
        """Return the number of blocks that the replica is thought to hold."""
        return len(self._blocks.get(replica.life, ()))

    def match_share(self, request: Request, replica: Replica) -> float:
        """Return the share of the prompt's blocks that the replica is thought to hold, 0–1.

        0 for a prompt of less than a block.
        """
        hashes, blocks = request.prefix_hashes, self._blocks.get(replica.life)
        if not hashes or not blocks:
            return 0.0
        # Known blocks come first, so bisection finds their number.
        return bisect_left(hashes, True, key=lambda block: block not in blocks) / len(hashes)

    def add(self, request: Request, replica: Replica) -> None:
        """Record that the request is sent to the replica."""
        if not request.prefix_hashes:
            return
        blocks = self._blocks.setdefault(replica.life, OrderedDict())
        for block in reversed(request.prefix_hashes):
            blocks[block] = None
            blocks.move_to_end(block)
        for _ in range(len(blocks) - max(1, replica.info.num_kv_tokens // PREFIX_BLOCK_TOKENS)):
            blocks.popitem(last=False)
