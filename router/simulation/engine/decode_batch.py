"""Sequences that decode: they all advance by one token per step, so they are counts."""

import heapq

from router.simulation.engine.kv_cache import KvCache
from router.simulation.engine.sequence import Sequence, State


class DecodeBatch:
    """Who decodes, how much context they have, when they need blocks and when they end.

    A tick is a step in which they advance. While a sequence is in here, its own counts are
    those of the tick at which it joined.
    """

    def __init__(self, kv: KvCache, block_size: int) -> None:
        self.tick = 0
        self.num_sequences = 0
        self.num_context_tokens = 0
        self._kv = kv
        self._block_size = block_size
        # [r]: how many need a new block when the tick is r modulo the block size.
        self._num_crossing = [0] * block_size
        self._finishes: list[tuple[int, int, Sequence]] = []

    def num_new_blocks(self, num_ticks: int = 0) -> int:
        """Return how many blocks they need, if all stay, so many ticks from now."""
        return self._num_crossing[(self.tick + num_ticks) % self._block_size]

    def advance(self, num_steps: int) -> None:
        """Give everybody so many tokens."""
        self.tick += num_steps
        self.num_context_tokens += num_steps * self.num_sequences

    def add(self, sequence: Sequence) -> None:
        """Take in a sequence whose prompt is computed."""
        sequence.state = State.DECODE
        sequence.joined_tick = self.tick
        self.num_sequences += 1
        self.num_context_tokens += sequence.num_tokens
        self._num_crossing[self._crossing(sequence)] += 1
        heapq.heappush(self._finishes, (self._finish_tick(sequence), sequence.serial, sequence))

    def remove(self, sequence: Sequence) -> None:
        """Let a sequence go, its counts brought to the present; what it is now is the caller's."""
        self.sync(sequence)
        self._num_crossing[self._crossing(sequence)] -= 1
        num_ticks = self.tick - sequence.joined_tick
        sequence.num_emitted += num_ticks
        sequence.num_computed += num_ticks
        self.num_sequences -= 1
        self.num_context_tokens -= sequence.num_tokens

    def remove_finished(self) -> list[Sequence]:
        """Let go whose output is complete, and return them."""
        finished = []
        while self._finishes and self._finishes[0][0] <= self.tick:
            tick, _, sequence = heapq.heappop(self._finishes)
            if self._is_current(tick, sequence):
                self.remove(sequence)
                finished.append(sequence)
        return finished

    def next_finish_tick(self) -> int:
        """Return the first tick with which an output is complete; somebody must be in here."""
        while True:
            tick, _, sequence = self._finishes[0]
            if self._is_current(tick, sequence):
                return tick
            heapq.heappop(self._finishes)

    def sync(self, sequence: Sequence) -> None:
        """Write the blocks that a sequence in here took into its lease."""
        lease = sequence.lease
        num_blocks = -(-self.num_computed(sequence) // self._block_size)
        num_shared = len(lease.shared) * self._kv.segment_blocks
        lease.num_private = max(lease.num_private, num_blocks - num_shared)

    def num_computed(self, sequence: Sequence) -> int:
        """Return the tokens in the KV cache of a sequence in here."""
        return sequence.num_computed + self.tick - sequence.joined_tick

    def num_emitted(self, sequence: Sequence) -> int:
        """Return the output so far of a sequence in here."""
        return sequence.num_emitted + self.tick - sequence.joined_tick

    def _crossing(self, sequence: Sequence) -> int:
        """At which ticks, modulo the block size, its blocks are full."""
        return (sequence.joined_tick - sequence.num_computed) % self._block_size

    def _finish_tick(self, sequence: Sequence) -> int:
        return sequence.joined_tick + sequence.num_output - sequence.num_emitted

    def _is_current(self, tick: int, sequence: Sequence) -> bool:
        # It may have left and come back since.
        return sequence.state is State.DECODE and tick == self._finish_tick(sequence)
