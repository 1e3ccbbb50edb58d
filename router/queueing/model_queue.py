"""In which order do the requests that wait for one model go?"""

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import islice

from router.queueing.fair_share import charged_tokens
from router.queueing.lazy_heap import Key, LazyHeap
from router.types import Request

# (yields to all tenants that do not, virtual time of `router.queueing.fair_share`): lower is first.
VirtualTime = tuple[bool, float]

# Tokens are counted by ranges of so much of their keys: a quarter of the shortest TTFT target.
_RANGE_S = 0.125
# And in groups of so many ranges, as a power of 2: keys spread over some hundreds of ranges.
_GROUP_BITS = 4


def queue_name(request: Request) -> str:
    """Return who waits for the same engines: those of one model; suspects wait for engines alone.

    So do those that only one engine can serve. No property of `Request`, which stays plain
    Python where the core is compiled.
    """
    if request.only_at and not request.is_suspect:
        return f"{request.model} (at {request.only_at})"
    return f"{request.model} (suspects)" if request.is_suspect else request.model


class _Tokens:
    """Prompt tokens of one tenant by ranges of keys, counted in ranges and in groups of ranges."""

    __slots__ = ("_groups", "_ranges", "num_tokens")

    def __init__(self) -> None:
        self.num_tokens = 0  # in all
        self._ranges: dict[int, int] = {}  # only those that are not 0
        self._groups: dict[int, int] = {}  # likewise

    def add(self, key_range: int, num_tokens: int) -> None:
        """Count tokens of a range; take them back if negative."""
        self.num_tokens += num_tokens
        _add(self._ranges, key_range, num_tokens)
        _add(self._groups, key_range >> _GROUP_BITS, num_tokens)

    def num_until(self, last: int) -> int:
        """Return the tokens of the ranges up to this one."""
        last_group = last >> _GROUP_BITS
        num_tokens = 0
        for group, num_each in self._groups.items():
            if group < last_group:
                num_tokens += num_each
        if last_group in self._groups:
            for key_range in range(last_group << _GROUP_BITS, last + 1):
                num_tokens += self._ranges.get(key_range, 0)
        return num_tokens


class ModelQueue:
    """Tenants by their virtual time, and the requests of each tenant by their own key.

    With one tenant that is the order of its requests and nothing else.
    """

    __slots__ = (
        "_by_tenant",
        "_front",
        "_front_keys",
        "_front_length",
        "_num_requests",
        "_tenants",
        "_tokens",
        "virtual_times",
    )

    def __init__(self) -> None:
        self._num_requests = 0
        self._tokens: dict[str, _Tokens] = {}  # of each tenant
        self._by_tenant: dict[str, LazyHeap] = {}  # only those that are not empty
        self._tenants = LazyHeap()  # by virtual time
        self.virtual_times: dict[str, VirtualTime] = {}  # of the tenants that wait here
        # The first requests in order, and their keys, kept up with what comes and goes while
        # there is one tenant. The former is replaced, never changed; empty: not known.
        self._front: list[Request] = []
        self._front_keys: list[Key] = []
        self._front_length = 0  # most that it has

    def __len__(self) -> int:
        return self._num_requests

    def push(self, request: Request, key: Key) -> None:
        """Add a request; `set_virtual_time` of its tenant has to follow."""
        heap = self._by_tenant.get(request.tenant)
        if heap is None:
            heap = self._by_tenant[request.tenant] = LazyHeap()
            self._tokens[request.tenant] = _Tokens()
        heap.push(request.id, key)
        self._num_requests += 1
        self._tokens[request.tenant].add(_key_range(key), request.num_prompt_tokens)
        if self._front:
            self._enter_front(request, key)

    def num_tokens(self, tenant: str) -> int:
        """Return the prompt tokens of a tenant's requests."""
        tokens = self._tokens.get(tenant)
        return tokens.num_tokens if tokens is not None else 0

    def num_tokens_before(self, tenant: str, key: Key) -> int:
        """Return the prompt tokens of a tenant's requests of lower keys, or up to 0.125 s above."""
        tokens = self._tokens.get(tenant)
        return tokens.num_until(_key_range(key)) if tokens is not None else 0

    def remove(self, request: Request, key: Key) -> bool:
        """Remove a request of this key. Return True if its tenant has another one here."""
        self._num_requests -= 1
        self._tokens[request.tenant].add(_key_range(key), -request.num_prompt_tokens)
        heap = self._by_tenant[request.tenant]
        heap.remove(request.id)
        if self._front:
            self._leave_front(request, key)
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
            if len(self._by_tenant) > 1:
                self._forget_front()

    def first_id_of(self, tenant: str) -> str:
        """Return the id of the first request of a tenant that waits here."""
        return self._by_tenant[tenant].head()[1]

    def first_id(self) -> str:
        """Return the id of the first request. The queue is not empty."""
        return self.first_id_of(self._first_tenant())

    def head(self) -> tuple[VirtualTime, Key, str]:
        """Return virtual time, key and id of the first request. The queue is not empty."""
        tenant = self._first_tenant()
        key, request_id = self._by_tenant[tenant].head()
        return self.virtual_times[tenant], key, request_id

    def _first_tenant(self) -> str:
        if len(self._by_tenant) == 1:
            for tenant in self._by_tenant:
                return tenant
        return self._tenants.head()[1]

    def front(self, num_requests: int, held: dict[str, Request]) -> list[Request]:
        """Return the first so many requests, or more, in order; all if there are fewer.

        The same list as long as nothing in it changes; it is not to be changed.
        """
        if len(self._front) < min(num_requests, self._num_requests):
            # Twice as many as are asked for, so that this is not done again for each that goes.
            self._front_length = 2 * num_requests
            self._front = list(islice(self.in_order(held), self._front_length))
            self._front_keys = []
            if len(self._by_tenant) == 1:
                ((_, heap),) = self._by_tenant.items()
                self._front_keys = [heap.key(request.id) for request in self._front]
        return self._front

    def _enter_front(self, request: Request, key: Key) -> None:
        """Put a request that has come in its place, if that is at the front."""
        keys, length = self._front_keys, self._front_length
        if len(self._by_tenant) > 1 or not keys:
            self._forget_front()
            return
        is_all = len(keys) == self._num_requests - 1  # this request aside
        if key < keys[-1] or (is_all and len(keys) < length):
            index = bisect_right(keys, key)  # equal keys: first come, first served
            self._front = self._front[: length - 1]
            self._front.insert(index, request)
            keys.insert(index, key)
            del keys[length:]

    def _leave_front(self, request: Request, key: Key) -> None:
        """Take out a request that has gone, if it was at the front."""
        keys = self._front_keys
        if not keys:
            self._forget_front()
            return
        index = bisect_left(keys, key)
        while index < len(keys) and keys[index] == key:
            if self._front[index].id == request.id:
                self._front = self._front.copy()
                del self._front[index], keys[index]
                return
            index += 1

    def _forget_front(self) -> None:
        self._front, self._front_keys = [], []

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


def _add(counts: dict[int, int], key: int, num: int) -> None:
    """Add to a count; drop it where it becomes 0."""
    count = counts.get(key, 0) + num
    if count:
        counts[key] = count
    else:
        counts.pop(key, None)
