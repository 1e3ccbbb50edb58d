"""How many tokens an answer will have, predicted before it begins."""

from collections import OrderedDict

from router.types import Request

# Before anything is known: real traffic's median answer has 115 to 140 tokens (Azure 2023
# conversations 115, LMSYS-Chat-1M 140).
_PRIOR_TOKENS = 128.0

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


class OutputLengths:
    """Mean answer lengths per group of requests, shrunk towards wider groups.

    Three nested groups: same model; same tenant and client's limit, too; same
    size of prompt, too (sizes and limits by powers of two). Each estimate is
    pulled towards that of the next wider group by the weight of a few answers
    (empirical Bayes; Efron and Morris 1975), so that a new group starts from
    what is known and soon stands on its own. Text is not looked at.
    """

    __slots__ = ("_groups",)

    def __init__(self) -> None:
        # (weight, sum of tokens) by group, both fading; the least recently used first.
        self._groups: OrderedDict[_Group, tuple[float, float]] = OrderedDict()

    def predict(self, request: Request) -> int:
        """Expected tokens of one sequence of the answer, 1 to the client's own limit."""
        estimate = _PRIOR_TOKENS
        for group in _groups(request):
            weight, total = self._groups.get(group, (0.0, 0.0))
            estimate = (total + _SHRINKAGE * estimate) / (weight + _SHRINKAGE)
        limit = request.max_output_tokens
        return max(1, round(estimate if limit is None else min(estimate, limit)))

    def learn(self, request: Request, num_output_tokens: int) -> None:
        """Take in how long an answer came out, all its sequences together."""
        num_each = num_output_tokens / request.num_sequences
        keep = 1.0 - 1.0 / _MEMORY_ANSWERS
        for group in _groups(request):
            weight, total = self._groups.get(group, (0.0, 0.0))
            self._groups[group] = (keep * weight + 1.0, keep * total + num_each)
            self._groups.move_to_end(group)
        while len(self._groups) > _MAX_GROUPS:
            self._groups.popitem(last=False)


def _groups(request: Request) -> tuple[_Group, ...]:
    """The groups that the request belongs to, the widest first."""
    limit = request.max_output_tokens
    wide = (request.model,)
    middle = (*wide, request.tenant, limit.bit_length() if limit is not None else None)
    return wide, middle, (*middle, request.num_prompt_tokens.bit_length())
