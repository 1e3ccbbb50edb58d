"""In which order do the requests that wait for one model go?"""

import heapq
from collections import Counter
from collections.abc import Iterator

from router.queueing.fair_share import charged_tokens
from router.queueing.lazy_heap import Key, LazyHeap
from router.types import Request

# (yields to all tenants that do not, virtual time of `router.queueing.fair_share`): lower is first.
VirtualTime = tuple[bool, float]

# Tokens are counted by ranges of so much of their keys: a quarter of the shortest TTFT target.
_RANGE_S = 0.125


class ModelQueue:
    """Tenants by their virtual time, and the requests of each tenant by their own key.

    With one tenant that is the order of its requests and nothing else.
    """

    __slots__ = ("_by_tenant", "_num_requests", "_tenants", "_tokens", "virtual_times")

    def __init__(self) -> None:
        self._num_requests = 0
        # Prompt tokens of each tenant by the range of their keys; only those that are not 0.
        self._tokens: dict[str, Counter[int]] = {}
        self._by_tenant: dict[str, LazyHeap] = {}  # only those that are not empty
        self._tenants = LazyHeap()  # by virtual time
        self.virtual_times: dict[str, VirtualTime] = {}  # of the tenants that wait here

    def __len__(self) -> int:
        return self._num_requests

    def push(self, request: Request, key: Key) -> None:
        """Add a request; `set_virtual_time` of its tenant has to follow."""
        heap = self._by_tenant.get(request.tenant)
        if heap is None:
            heap = self._by_tenant[request.tenant] = LazyHeap()
            self._tokens[request.tenant] = Counter()
        heap.push(request.id, key)
        self._num_requests += 1
        self._tokens[request.tenant][_key_range(key)] += request.num_prompt_tokens

    def num_tokens(self, tenant: str) -> int:
        """Return the prompt tokens of a tenant's requests."""
        return sum(self._tokens.get(tenant, {}).values())

    def num_tokens_before(self, tenant: str, key: Key) -> int:
        """Return the prompt tokens of a tenant's requests of lower keys, or up to 0.125 s above."""
        last = _key_range(key)
        ranges = self._tokens.get(tenant, {}).items()
        return sum(num_tokens for key_range, num_tokens in ranges if key_range <= last)

    def remove(self, request: Request, key: Key) -> bool:
        """Remove a request of this key. Return True if its tenant has another one here."""
        self._num_requests -= 1
        tokens, key_range = self._tokens[request.tenant], _key_range(key)
        tokens[key_range] -= request.num_prompt_tokens
        if not tokens[key_range]:
            del tokens[key_range]
        heap = self._by_tenant[request.tenant]
        heap.remove(request.id)
        if heap:
            return True
        for by_tenant in (self._by_tenant, self._tokens, self.virtual_times):
            del by_tenant[request.tenant]
        self._tenants.remove(request.tenant)
        return False

    def set_virtual_time(self, tenant: str, virtual_time: VirtualTime) -> None:
        """Put a tenant that waits here in its place among the others."""
        if self.virtual_times.get(tenant) != virtual_time:
            self._tenants.remove(tenant)
            self._tenants.push(tenant, virtual_time)
            self.virtual_times[tenant] = virtual_time

    def first_id_of(self, tenant: str) -> str:
        """Return the id of the first request of a tenant that waits here."""
        return self._by_tenant[tenant].head()[1]

    def head(self) -> tuple[VirtualTime, Key, str]:
        """Return virtual time, key and id of the first request. The queue is not empty."""
        if len(self._by_tenant) == 1:
            ((tenant, heap),) = self._by_tenant.items()
        else:
            tenant = self._tenants.head()[1]
            heap = self._by_tenant[tenant]
        return self.virtual_times[tenant], *heap.head()

    def in_order(self, held: dict[str, Request]) -> Iterator[Request]:
        """Yield the requests in the order in which they would go if all went now.

        k of them cost O(k log k). Do not change the queue meanwhile.
        """
        if len(self._by_tenant) == 1:
            (heap,) = self._by_tenant.values()
            yield from map(held.__getitem__, heap.in_order())
            return
        tenants = self._tenants.in_order()
        tenant = next(tenants, None)
        # Of each tenant the next one: virtual time, tie-break, request, ids that follow it.
        candidates: list[tuple[VirtualTime, int, Request, Iterator[str]]] = []
        num_pushed = 0
        while candidates or tenant is not None:
            if tenant is not None and (
                not candidates or self.virtual_times[tenant] <= candidates[0][0]
            ):
                virtual_time, ids = self.virtual_times[tenant], self._by_tenant[tenant].in_order()
                tenant = next(tenants, None)
            else:
                (yields, time), _, request, ids = heapq.heappop(candidates)
                yield request
                virtual_time = (yields, time + charged_tokens(request) / request.weight)
            if (request_id := next(ids, None)) is not None:
                num_pushed += 1
                heapq.heappush(candidates, (virtual_time, num_pushed, held[request_id], ids))


def _key_range(key: Key) -> int:
    return int(key[0] / _RANGE_S)
