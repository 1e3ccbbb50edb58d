"""When do decoding sequences need blocks, and when do they end?

Each of them advances by one token per step, so they are counted and not visited.
"""

import heapq

from router.simulation.engine.kv_cache import KvCache
from router.simulation.engine.sequence import DECODE, Sequence


class DecodeBatch:
    """The decoding sequences: their context, the blocks that they need and their ends.

    A tick is a step in which they advance. While a sequence is in the batch, its own counts are
    those of the tick at which it joined.
    """

    def __init__(self, kv: KvCache, block_size: int) -> None:
        self.tick = 0
        self.num_sequences = 0
        self.num_context_tokens = 0
        self._kv = kv
        self._block_size = block_size
        # [block_size]; at r: how many need a new block when the tick is r modulo the block size.
        self._num_crossing = [0] * block_size
        self._finishes: list[tuple[int, int, Sequence]] = []

    def num_new_blocks(self, num_ticks: int = 0) -> int:
        """Return the blocks that they need so many ticks from now, if all stay."""
        return self._num_crossing[(self.tick + num_ticks) % self._block_size]

    def advance(self, num_steps: int) -> None:
        """Advance every sequence by so many tokens."""
        self.tick += num_steps
        self.num_context_tokens += num_steps * self.num_sequences

    def add(self, sequence: Sequence) -> None:
        """Add a sequence whose prompt is computed."""
        sequence.state = DECODE
        sequence.joined_tick = self.tick
        self.num_sequences += 1
        self.num_context_tokens += sequence.num_tokens
        self._num_crossing[self._crossing(sequence)] += 1
        heapq.heappush(self._finishes, (self._finish_tick(sequence), sequence.serial, sequence))

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence and bring its counts to the present; the caller sets its state."""
        self.sync(sequence)
        self._num_crossing[self._crossing(sequence)] -= 1
        num_ticks = self.tick - sequence.joined_tick
        sequence.num_emitted += num_ticks
        sequence.num_computed += num_ticks
        self.num_sequences -= 1
        self.num_context_tokens -= sequence.num_tokens

    def remove_finished(self) -> list[Sequence]:
        """Remove the sequences whose output is complete, and return them."""
        finished = []
        while self._finishes and self._finishes[0][0] <= self.tick:
            tick, _, sequence = heapq.heappop(self._finishes)
            if self._is_current(tick, sequence):
                self.remove(sequence)
                finished.append(sequence)
        return finished

    def next_finish_tick(self) -> int:
        """Return the first tick at which an output is complete. The batch must not be empty."""
        while True:
            tick, _, sequence = self._finishes[0]
            if self._is_current(tick, sequence):
                return tick
            heapq.heappop(self._finishes)

    def sync(self, sequence: Sequence) -> None:
        """Update the block table of a sequence in the batch with the blocks allocated to it."""
        block_table = sequence.block_table
        num_blocks = -(-self.num_computed(sequence) // self._block_size)
        num_shared = len(block_table.shared) * self._kv.segment_blocks
        block_table.num_private = max(block_table.num_private, num_blocks - num_shared)

    def num_computed(self, sequence: Sequence) -> int:
        """Return the tokens that a sequence in the batch has in the KV cache."""
        return sequence.num_computed + self.tick - sequence.joined_tick

    def num_emitted(self, sequence: Sequence) -> int:
        """Return the tokens that a sequence in the batch has emitted."""
        return sequence.num_emitted + self.tick - sequence.joined_tick

    def _crossing(self, sequence: Sequence) -> int:
        """Return at which ticks, modulo the block size, its blocks are full."""
        return (sequence.joined_tick - sequence.num_computed) % self._block_size

    def _finish_tick(self, sequence: Sequence) -> int:
        return sequence.joined_tick + sequence.num_output - sequence.num_emitted

    def _is_current(self, tick: int, sequence: Sequence) -> bool:
        # It may have been removed and added again since.
        return sequence.state is DECODE and tick == self._finish_tick(sequence)
