"""Which sequence is admitted next, and how many tokens do all that wait need?"""

from itertools import islice

from router.queueing.lazy_heap import Key, LazyHeap
from router.simulation.engine.sequence import WAITING, Sequence


class WaitingSequences:
    """Sequences in the order of their keys, and the sums of their tokens to compute.

    `chunk`: the most tokens of one sequence in a step.
    """

    def __init__(self, chunk: int) -> None:
        self.num_tokens = 0  # to compute, before the prefix cache is looked up
        self.num_demand_tokens = 0  # of these, what the next step would compute
        self._chunk = chunk
        self._order = LazyHeap()
        self._sequences: dict[str, Sequence] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def demand_tokens(self, chunk: int) -> int:
        """Return what the next step would compute of them if each had so many tokens at most."""
        demand = 0
        for sequence in self._sequences.values():
            demand += min(_num_expected(sequence), chunk)
        return demand

    def head(self) -> Sequence:
        """Return the sequence to admit next. There must be one."""
        return self._sequences[self._order.head()[1]]

    def first(self, num_sequences: int) -> list[Sequence]:
        """Return the next so many sequences, in order; all if there are fewer."""
        ids = islice(self._order.in_order(), num_sequences)
        return [self._sequences[each] for each in ids]

    def push(self, sequence: Sequence, key: Key) -> None:
        """Add a sequence."""
        sequence.state = WAITING
        self._order.push(sequence.id, key)
        self._sequences[sequence.id] = sequence
        num_left = _num_expected(sequence)
        self.num_tokens += num_left
        self.num_demand_tokens += min(num_left, self._chunk)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence that waits."""
        self._order.remove(sequence.id)
        del self._sequences[sequence.id]
        num_left = _num_expected(sequence)
        self.num_tokens -= num_left
        self.num_demand_tokens -= min(num_left, self._chunk)


def _num_expected(sequence: Sequence) -> int:
    """Return its tokens to compute, by the router's expectation of the prefix cache."""
    if sequence.num_preemptions:
        return sequence.num_tokens
    return max(1, sequence.num_tokens - sequence.job.num_expected_cached_tokens)
