"""How full is the hold queue, and who has to make room when it is full?"""

from collections.abc import Iterator

from router.core.settings import RouterSettings
from router.types import Request

# Requests evicted for one other, at most: bounds the work of one arrival. A request
# that needs more room than that is refused.
_MAX_EVICTED = 32

_REQUESTS, _TOKENS, _BYTES = range(3)


def _sizes(request: Request) -> tuple[int, int, int]:
    """Return what a request takes of each bound: requests, prompt tokens, bytes."""
    return 1, request.num_prompt_tokens, request.num_bytes


def _take(taken: list[int], request: Request, times: int) -> None:
    """Count a request in what is taken of each bound; with `times` -1, no longer."""
    taken[_REQUESTS] += times
    taken[_TOKENS] += times * request.num_prompt_tokens
    taken[_BYTES] += times * request.num_bytes


class _Tenant:
    __slots__ = ("evictable", "taken", "weight")

    def __init__(self) -> None:
        self.taken = [0, 0, 0]  # of each bound
        self.weight = 1.0  # as of its latest request
        # Never placed before, by id, in the order in which they were held.
        self.evictable: dict[str, Request] = {}


class QueueBounds:
    """The queue's bounds, and how much of each is taken, in all and by tenant.

    A full queue makes room for a tenant that would still take less of the bound that is
    reached, over its weight, than the tenant that takes most of it (max-min fairness). Of
    the latter the newest requests leave, because they have waited least. No tenant evicts
    its own requests, and a request that has been placed before is never evicted.
    """

    __slots__ = ("_limits", "_taken", "_tenants")

    def __init__(self, settings: RouterSettings) -> None:
        self._limits = (
            settings.max_held_requests,
            settings.max_held_tokens,
            settings.max_held_bytes,
        )
        self._taken = [0, 0, 0]  # of each bound
        self._tenants: dict[str, _Tenant] = {}  # only those that wait

    @property
    def num_tokens(self) -> int:
        """Prompt tokens held."""
        return self._taken[_TOKENS]

    @property
    def num_bytes(self) -> int:
        """Bytes of request bodies held."""
        return self._taken[_BYTES]

    def add(self, request: Request) -> None:
        """Count a request that is held from now on."""
        tenant = self._tenants.get(request.tenant)
        if tenant is None:
            tenant = self._tenants[request.tenant] = _Tenant()
        tenant.weight = request.weight
        _take(self._taken, request, 1)
        _take(tenant.taken, request, 1)
        if not request.was_placed:
            tenant.evictable[request.id] = request

    def remove(self, request: Request) -> None:
        """Stop counting a request that is held no longer."""
        tenant = self._tenants[request.tenant]
        _take(self._taken, request, -1)
        _take(tenant.taken, request, -1)
        tenant.evictable.pop(request.id, None)
        if not tenant.taken[_REQUESTS]:
            del self._tenants[request.tenant]

    def has_room(self, request: Request) -> bool:
        """Whether the bounds leave room for a request."""
        taken, limits = self._taken, self._limits
        return (
            taken[_REQUESTS] < limits[_REQUESTS]
            and taken[_TOKENS] + request.num_prompt_tokens <= limits[_TOKENS]
            and taken[_BYTES] + request.num_bytes <= limits[_BYTES]
        )

    def eviction_candidates(self, request: Request) -> list[Request]:
        """Return who has to leave so that a request has room; [] if it should have none."""
        sizes = _sizes(request)
        own = self._tenants.get(request.tenant)
        others = {
            name: (list(tenant.taken), reversed(tenant.evictable.values()), tenant.weight)
            for name, tenant in self._tenants.items()
            if tenant is not own
        }
        left = list(self._taken)  # of each bound, without those who leave
        leaving: list[Request] = []
        for bound, limit in enumerate(self._limits):
            would_take = (sizes[bound] + (own.taken[bound] if own else 0)) / request.weight
            while left[bound] + sizes[bound] > limit:
                victim = None
                if len(leaving) < _MAX_EVICTED:
                    victim = _take_newest_of_largest(others, bound, would_take)
                if victim is None:
                    return []
                leaving.append(victim)
                for each, size in enumerate(_sizes(victim)):
                    left[each] -= size
        return leaving


def _take_newest_of_largest(
    others: dict[str, tuple[list[int], Iterator[Request], float]], bound: int, would_take: float
) -> Request | None:
    """Take the newest request of the tenant that takes most of a bound out of `others`.

    Return it, or None if no tenant takes more than `would_take` over its weight.
    """
    while others:
        name = max(others, key=lambda name: others[name][0][bound] / others[name][2])
        taken, newest_first, weight = others[name]
        if taken[bound] / weight <= would_take:
            return None
        victim = next(newest_first, None)
        if victim is not None:
            for each, size in enumerate(_sizes(victim)):
                taken[each] -= size
            return victim
        del others[name]  # nothing that it has left may be evicted
    return None
