"""How many tokens will an answer have?

Two estimates, because they are for different things:

- `OutputLengths` tells groups of requests apart. The router needs it per request, to find KV
  room and to compare engines; it learns from what our engines have answered.
- `MeanOutputLength` is one number for all requests of its owner, for a reservation that is
  corrected when the answer has ended. Each provider has its own, because its model is another
  one than ours; each tenant's quota has its own, because it counts over all models, and before
  the router knows of the request.
"""

from collections import OrderedDict

from router.estimators.lengths.forecast import Forecast, Lengths
from router.types import Request

# Before anything is known: real traffic's median answer has 115 to 140 tokens (Azure 2023
# conversations 115, LMSYS-Chat-1M 140).
PRIOR_TOKENS = 128.0

# The wider group weighs as much as this many answers of the narrower one. Answer lengths
# scatter by about their mean, so eight of them are sure to a third of it, which is what
# neighbouring groups differ by.
_SHRINKAGE = 8.0

# An answer counts 1/e after so many later ones of its group: sure to 1/16, and a change of
# traffic is followed within a few hundred requests.
_MEMORY_ANSWERS = 256

# Groups remembered, some 250 bytes each. Tenants and client limits make many.
_MAX_GROUPS = 20_000

_Group = tuple[object, ...]


class OutputLengths(Lengths):
    """Mean answer lengths per group of requests, shrunk towards wider groups.

    Three nested groups: same model; also same tenant and client's limit; also same
    size of prompt (sizes and limits by powers of two). Each estimate is
    pulled towards that of the next wider group by the weight of a few answers
    (empirical Bayes; Efron and Morris 1975), so that a new group starts from
    what is known and soon goes by its own answers. The text is not read.
    """

    def __init__(self) -> None:
        # (weight, sum of tokens) by group, both decayed; the least recently used first.
        self._groups: OrderedDict[_Group, tuple[float, float]] = OrderedDict()

    def predict(self, request: Request) -> int:
        """Return the expected tokens of one sequence, from 1 to the client's own limit."""
        estimate = PRIOR_TOKENS
        for group in _groups(request):
            weight, total = self._groups.get(group, (0.0, 0.0))
            estimate = (total + _SHRINKAGE * estimate) / (weight + _SHRINKAGE)
        limit = request.max_output_tokens
        return max(1, round(estimate if limit is None else min(estimate, limit)))

    def forecast(self, request: Request) -> Forecast:
        num_tokens = self.predict(request)
        return Forecast(num_expected_tokens=num_tokens, num_booked_tokens=num_tokens)

    def learn(self, request: Request, num_output_tokens: int) -> None:
        num_each = num_output_tokens / request.num_sequences
        keep = 1.0 - 1.0 / _MEMORY_ANSWERS
        for group in _groups(request):
            weight, total = self._groups.get(group, (0.0, 0.0))
            self._groups[group] = (keep * weight + 1.0, keep * total + num_each)
            self._groups.move_to_end(group)
        while len(self._groups) > _MAX_GROUPS:
            self._groups.popitem(last=False)


class MeanOutputLength:
    """The mean length of one sequence of an answer, exponentially weighted."""

    __slots__ = ("_memory", "_num_tokens")

    def __init__(self, prior_tokens: float, memory: float) -> None:
        """Start at `prior_tokens`; an answer counts 1/e after `memory` later ones."""
        self._num_tokens = prior_tokens
        self._memory = memory

    def predict(self, max_output_tokens: int | None) -> float:
        """Return the expected tokens of one sequence, at most the client's own limit."""
        if max_output_tokens is None:
            return self._num_tokens
        return min(self._num_tokens, max_output_tokens)

    def learn(self, num_output_tokens: int, num_sequences: int) -> None:
        """Learn from the tokens of an answer, all its sequences together."""
        num_each = num_output_tokens / num_sequences
        self._num_tokens += (num_each - self._num_tokens) / self._memory


def _groups(request: Request) -> tuple[_Group, ...]:
    """Return the groups that the request belongs to, the widest first."""
    limit = request.max_output_tokens
    wide = (request.model,)
    middle = (*wide, request.tenant, limit.bit_length() if limit is not None else None)
    return wide, middle, (*middle, request.num_prompt_tokens.bit_length())
