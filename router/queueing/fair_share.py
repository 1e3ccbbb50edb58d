"""Whose turn it is among tenants that wait: weighted shares of tokens."""

from router.queueing.lazy_heap import LazyHeap
from router.types import Request, Usage


class FairShare:
    """Virtual time per tenant: tokens taken over weight; the least goes first.

    Start-time fair queueing (Goyal, Vin and Cheng 1996), except that its virtual
    time is the least of all who wait (as in WF2Q+, Bennett and Zhang 1996), for
    requests leave to many engines side by side. Whoever begins to wait starts
    there: having been idle earns no credit. Between tenants that wait all the
    time, tokens over weight differ at most by what is in the engines and not yet
    settled. When nobody waits, nothing is remembered: there was enough for all.

    A request is charged as it is placed, whether it had to wait or not, and
    settled with what it took. A tenant that waits alone is not charged.
    """

    __slots__ = ("_now", "_tags", "_waiting")

    def __init__(self) -> None:
        self._now = 0.0
        self._tags: dict[str, float] = {}
        self._waiting = LazyHeap()

    @property
    def num_waiting(self) -> int:
        """Tenants that wait."""
        return len(self._waiting)

    def tag(self, tenant: str) -> float:
        """Virtual time of a tenant that waits, tokens over weight."""
        return self._tags[tenant]

    def entry_tag(self, tenant: str) -> float:
        """The same of any tenant, if it began to wait now."""
        tag = self._tags.get(tenant, 0.0)
        if tenant in self._waiting or not self._waiting:
            return tag
        return max(self._now, self._waiting.head()[0][0], tag)

    def join(self, tenant: str) -> None:
        """The tenant begins to wait; one that waits already changes nothing."""
        if tenant not in self._waiting:
            self._advance()
            self._tags[tenant] = max(self._now, self._tags.get(tenant, 0.0))
            self._waiting.push(tenant, (self._tags[tenant],))

    def leave(self, tenant: str) -> None:
        """The tenant waits for nothing any more."""
        self._advance()
        self._waiting.remove(tenant)
        if not self._waiting:
            self._tags.clear()
            self._now = 0.0

    def charge(self, tenant: str, num_tokens: float, weight: float) -> bool:
        """Count tokens, or a negative number to give back; whether that changed a turn."""
        is_waiting = tenant in self._waiting
        if len(self._waiting) <= is_waiting:
            return False  # nobody else waits
        tag = self._tags.get(tenant, self._now) + num_tokens / weight
        self._tags[tenant] = max(self._now, tag) if num_tokens < 0.0 else tag
        if is_waiting:
            self._advance()
            self._waiting.remove(tenant)
            self._waiting.push(tenant, (self._tags[tenant],))
        return is_waiting

    def _advance(self) -> None:
        if self._waiting:
            self._now = max(self._now, self._waiting.head()[0][0])


def charged_tokens(request: Request) -> int:
    """What a request is charged when it is placed, tokens: its prompt."""
    return request.num_prompt_tokens


def owed_tokens(request: Request, usage: Usage) -> int:
    """What is to be charged on top when it has ended, tokens; may be negative."""
    return usage.num_prompt_tokens + usage.num_output_tokens - charged_tokens(request)
