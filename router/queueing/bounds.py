"""What of the hold queue each tenant takes, and who has to make room when it is full."""

from collections.abc import Iterator

from router.settings import RouterSettings
from router.types import Request

# Who makes room for one request, at most: bounds the work of one arrival. A request
# that needs more room than that is refused.
_MAX_PUSHED_OUT = 32

_REQUESTS, _TOKENS, _BYTES = range(3)


def _sizes(request: Request) -> tuple[int, int, int]:
    """What a request takes of each bound."""
    return 1, request.num_prompt_tokens, request.num_bytes


class _Tenant:
    __slots__ = ("newcomers", "taken", "weight")

    def __init__(self) -> None:
        self.taken = [0, 0, 0]  # of each bound
        self.weight = 1.0  # as of its latest request
        # Held for the first time, in the order in which they came: they may be pushed out.
        self.newcomers: dict[str, Request] = {}


class QueueBounds:
    """The queue's bounds, and how much of each is taken, in all and by tenant.

    A full queue makes room for whoever would still take less of what lacks, over its
    weight, than the tenant that takes most of it (max-min fairness): of that one the
    newest leave, which have waited least. Nobody pushes out its own, and what has been
    placed before is never pushed out.
    """

    __slots__ = ("_bounds", "_taken", "_tenants")

    def __init__(self, settings: RouterSettings) -> None:
        self._bounds = (
            settings.max_held_requests,
            settings.max_held_tokens,
            settings.max_held_bytes,
        )
        self._taken = [0, 0, 0]
        self._tenants: dict[str, _Tenant] = {}  # only those that wait

    @property
    def num_tokens(self) -> int:
        """Prompt tokens held."""
        return self._taken[_TOKENS]

    @property
    def num_bytes(self) -> int:
        """Bytes of bodies held."""
        return self._taken[_BYTES]

    def add(self, request: Request) -> None:
        """Count a request that is held from now on."""
        tenant = self._tenants.get(request.tenant)
        if tenant is None:
            tenant = self._tenants[request.tenant] = _Tenant()
        tenant.weight = request.weight
        for bound, size in enumerate(_sizes(request)):
            self._taken[bound] += size
            tenant.taken[bound] += size
        if not request.tried:
            tenant.newcomers[request.id] = request

    def remove(self, request: Request) -> None:
        """Count a request no longer."""
        tenant = self._tenants[request.tenant]
        for bound, size in enumerate(_sizes(request)):
            self._taken[bound] -= size
            tenant.taken[bound] -= size
        tenant.newcomers.pop(request.id, None)
        if not tenant.taken[_REQUESTS]:
            del self._tenants[request.tenant]

    def has_room(self, request: Request) -> bool:
        """Whether the bounds leave room for a request."""
        return all(
            taken + size <= most
            for taken, size, most in zip(self._taken, _sizes(request), self._bounds, strict=True)
        )

    def eviction_candidates(self, request: Request) -> list[Request]:
        """Who has to leave for a request to have room; nobody where it should not have it."""
        sizes = _sizes(request)
        own = self._tenants.get(request.tenant)
        others = {
            name: (list(tenant.taken), reversed(tenant.newcomers.values()), tenant.weight)
            for name, tenant in self._tenants.items()
            if tenant is not own
        }
        rest = list(self._taken)  # as it would be without those who leave
        leaving: list[Request] = []
        for bound, most in enumerate(self._bounds):
            would_take = (sizes[bound] + (own.taken[bound] if own else 0)) / request.weight
            while rest[bound] + sizes[bound] > most:
                victim = None
                if len(leaving) < _MAX_PUSHED_OUT:
                    victim = _newest_of_the_greediest(others, bound, would_take)
                if victim is None:
                    return []
                leaving.append(victim)
                for each, size in enumerate(_sizes(victim)):
                    rest[each] -= size
        return leaving


def _newest_of_the_greediest(
    others: dict[str, tuple[list[int], Iterator[Request], float]], bound: int, would_take: float
) -> Request | None:
    """A request, taken out, of the tenant that takes most of a bound; None if none takes more."""
    while others:
        name = max(others, key=lambda name: others[name][0][bound] / others[name][2])
        taken, newest, weight = others[name]
        if taken[bound] / weight <= would_take:
            return None
        victim = next(newest, None)
        if victim is not None:
            for each, size in enumerate(_sizes(victim)):
                taken[each] -= size
            return victim
        del others[name]  # what it has left may not be pushed out
    return None
