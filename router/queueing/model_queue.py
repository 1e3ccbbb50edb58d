"""Requests that wait for one model."""

import heapq
from collections import Counter
from collections.abc import Iterator

from router.queueing.fair_share import charged_tokens
from router.queueing.lazy_heap import Key, LazyHeap
from router.types import Request

VirtualTime = tuple[bool, float]  # (yields to all others, virtual time)

# Tokens are counted by so much of their keys: a quarter of the shortest promise.
_GRAIN_S = 0.125


class ModelQueue:
    """Tenants by their turn, and each tenant's requests by their own order.

    With one tenant that is its requests' order and nothing else.
    """

    __slots__ = ("_by_tenant", "_num_requests", "_tokens", "_turns", "turns")

    def __init__(self) -> None:
        self._num_requests = 0
        # Prompt tokens of each tenant, by the grain of their keys; only those that are not empty.
        self._tokens: dict[str, Counter[int]] = {}
        self._by_tenant: dict[str, LazyHeap] = {}  # only those that are not empty
        self._turns = LazyHeap()
        self.turns: dict[str, VirtualTime] = {}

    def __len__(self) -> int:
        return self._num_requests

    def push(self, request: Request, key: Key) -> None:
        """Add a request whose tenant is then given its turn."""
        heap = self._by_tenant.get(request.tenant)
        if heap is None:
            heap = self._by_tenant[request.tenant] = LazyHeap()
            self._tokens[request.tenant] = Counter()
        heap.push(request.id, key)
        self._num_requests += 1
        self._tokens[request.tenant][_grain(key)] += request.num_prompt_tokens

    def num_tokens(self, tenant: str) -> int:
        """Prompt tokens of a tenant's requests."""
        return sum(self._tokens.get(tenant, {}).values())

    def num_tokens_before(self, tenant: str, key: Key) -> int:
        """Of these, those of lower keys, and of some up to 0.125 s above."""
        limit = _grain(key)
        grains = self._tokens.get(tenant, {}).items()
        return sum(num_tokens for grain, num_tokens in grains if grain <= limit)

    def remove(self, request: Request, key: Key) -> bool:
        """Take out a request of this key; whether its tenant waits here for another."""
        self._num_requests -= 1
        tokens, grain = self._tokens[request.tenant], _grain(key)
        tokens[grain] -= request.num_prompt_tokens
        if not tokens[grain]:
            del tokens[grain]
        heap = self._by_tenant[request.tenant]
        heap.remove(request.id)
        if heap:
            return True
        for by_tenant in (self._by_tenant, self._tokens, self.turns):
            del by_tenant[request.tenant]
        self._turns.remove(request.tenant)
        return False

    def set_turn(self, tenant: str, turn: VirtualTime) -> None:
        """Say when it is the turn of a tenant that waits here."""
        if self.turns.get(tenant) != turn:
            self._turns.remove(tenant)
            self._turns.push(tenant, turn)
            self.turns[tenant] = turn

    def first_of(self, tenant: str) -> str:
        """Id of the first request of a tenant that waits here."""
        return self._by_tenant[tenant].head()[1]

    def head(self) -> tuple[VirtualTime, Key, str]:
        """Virtual time, key and id of the first request. The lane is not empty."""
        if len(self._by_tenant) == 1:
            ((tenant, heap),) = self._by_tenant.items()
        else:
            tenant = self._turns.head()[1]
            heap = self._by_tenant[tenant]
        return self.turns[tenant], *heap.head()

    def in_order(self, held: dict[str, Request]) -> Iterator[Request]:
        """The requests as they would go if all went now, found one by one.

        k of them cost O(k log k). Do not change the lane meanwhile.
        """
        if len(self._by_tenant) == 1:
            (heap,) = self._by_tenant.values()
            yield from map(held.__getitem__, heap.in_order())
            return
        tenants = self._turns.in_order()
        tenant = next(tenants, None)
        # Virtual time, tie-break, request, those that follow it.
        going: list[tuple[VirtualTime, int, Request, Iterator[str]]] = []
        num_pushed = 0
        while going or tenant is not None:
            if tenant is not None and (not going or self.turns[tenant] <= going[0][0]):
                turn, ids = self.turns[tenant], self._by_tenant[tenant].in_order()
                tenant = next(tenants, None)
            else:
                (yields, tag), _, request, ids = heapq.heappop(going)
                yield request
                turn = (yields, tag + charged_tokens(request) / request.weight)
            if (request_id := next(ids, None)) is not None:
                num_pushed += 1
                heapq.heappush(going, (turn, num_pushed, held[request_id], ids))


def _grain(key: Key) -> int:
    return int(key[0] / _GRAIN_S)
