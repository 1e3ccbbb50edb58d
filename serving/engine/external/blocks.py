"""Which prompts does a server's prefix cache hold? Guessed from what it has computed for us.

It does not tell. But the ids of prompts and answers come back with the replies, and a cache of
known size that forgets the least recently used blocks holds what was computed last. What others
send there pushes blocks out sooner than this knows; then a prompt is prefilled that was taken to be
cached. Hashes are ours: equal for equal beginnings, at all servers with blocks of one size.
"""

from collections import OrderedDict
from collections.abc import Sequence

from router import BlockUpdate

_64_BITS = 2**64 - 1


class GuessedBlocks:
    """The blocks of one server, the least recently used first."""

    def __init__(self, num_tokens: int, block_size: int) -> None:
        """`num_tokens` and `block_size` of its KV cache."""
        self._max_blocks = max(1, num_tokens // block_size)
        self._block_size = block_size
        self._blocks: OrderedDict[int, None] = OrderedDict()
        self._position = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def hashes(self, token_ids: Sequence[int]) -> list[int]:
        """Return the hashes of the whole blocks of a text; each covers all before it."""
        size, parent = self._block_size, 0
        hashes = []
        for end in range(size, len(token_ids) + 1, size):
            parent = hash((parent, *token_ids[end - size : end])) & _64_BITS
            hashes.append(parent)
        return hashes

    def use(self, hashes: Sequence[int]) -> BlockUpdate | None:
        """Note that a text was computed, or found. Return what that changes; None if nothing."""
        blocks = self._blocks
        stored = [each for each in hashes if each not in blocks]
        # The end of a text is forgotten before its beginning, as vLLM frees it.
        for each in reversed(hashes):
            blocks[each] = None
            blocks.move_to_end(each)
        removed = []
        while len(blocks) > self._max_blocks:
            removed.append(blocks.popitem(last=False)[0])
        if not stored and not removed:
            return None
        since = self._position
        self._position += len(stored) + len(removed)
        return BlockUpdate(since=since, until=self._position, stored=stored, removed=removed)
