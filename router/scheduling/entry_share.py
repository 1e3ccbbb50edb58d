"""Whose turn it is to be let in while not everybody is: weighted shares of tokens.

The queue between tenants is fair among those that wait in it (`router.queueing.fair_share`).
While newcomers are refused it is too short for that, and fairness has to be at the
door: start-time fair queueing again (Goyal, Vin and Cheng 1996), where those that
were refused lately are the ones who would wait.
"""

import math


class AdmissionShare:
    """Tokens let in over weight, by tenant; who is ahead of the others has to wait for them."""

    __slots__ = ("_memory_s", "_tags", "_wanting")

    def __init__(self, memory_s: float) -> None:
        """A tenant that has not been refused for `memory_s` wants no more than it gets."""
        self._memory_s = memory_s
        self._tags: dict[str, float] = {}
        self._wanting: dict[str, tuple[float, float]] = {}  # refused last when, and its weight

    def tokens_ahead(self, tenant: str, now_s: float) -> float:
        """Tokens to be let in of others until it is this tenant's turn."""
        others = [
            (self._tags[name], weight)
            for name, (refused_s, weight) in self._wanting.items()
            if name != tenant and now_s - refused_s < self._memory_s
        ]
        if not others:
            return 0.0
        lead = self._tags.get(tenant, -math.inf) - min(tag for tag, _ in others)
        return max(0.0, lead) * sum(weight for _, weight in others)

    def let_in(self, tenant: str, weight: float, num_tokens: int, now_s: float) -> None:
        """A request of so many tokens was let in."""
        self._tags[tenant] = self._tag(tenant, now_s) + num_tokens / weight

    def refuse(self, tenant: str, weight: float, now_s: float) -> None:
        """A request was refused: its tenant wants more than it gets."""
        self._tags[tenant] = self._tag(tenant, now_s)
        self._wanting[tenant] = now_s, weight

    def _tag(self, tenant: str, now_s: float) -> float:
        """Its tag; having wanted less than a share earns no credit."""
        self._forget(now_s)
        tag = self._tags.get(tenant, 0.0)
        if tenant in self._wanting:
            return tag
        return max(tag, min((self._tags[name] for name in self._wanting), default=0.0))

    def _forget(self, now_s: float) -> None:
        for name, (refused_s, _) in list(self._wanting.items()):
            if now_s - refused_s >= self._memory_s:
                del self._wanting[name]
        if not self._wanting:
            self._tags.clear()
