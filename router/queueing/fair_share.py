"""Which of the tenants that wait is next? Tokens are shared by weight."""

from router.queueing.lazy_heap import LazyHeap
from router.types import Request, Usage


class FairShare:
    """Virtual time per tenant: tokens charged over weight; the lowest goes first.

    Start-time fair queueing (Goyal, Vin and Cheng 1996), except that the system's
    virtual time is the lowest of all tenants that wait (as in WF2Q+, Bennett and Zhang
    1996), because requests go to many engines side by side. A tenant that begins to wait
    starts at the system's virtual time: having been idle earns no credit. Between tenants
    that wait all the time, tokens over weight differ at most by what is in the engines and
    whose usage is not recorded yet. When nobody waits, all virtual times are forgotten:
    there was enough for everybody.

    A request is charged as it is placed, whether it had to wait or not, and what it used
    beyond that when it ends. A tenant that waits alone is not charged.
    """

    __slots__ = ("_system_time", "_virtual_times", "_waiting")

    def __init__(self) -> None:
        self._system_time = 0.0
        self._virtual_times: dict[str, float] = {}
        self._waiting = LazyHeap()  # tenants by virtual time

    @property
    def num_waiting(self) -> int:
        """Tenants that wait."""
        return len(self._waiting)

    def virtual_time(self, tenant: str) -> float:
        """Return the virtual time of a tenant that waits, tokens over weight."""
        return self._virtual_times[tenant]

    def entry_virtual_time(self, tenant: str) -> float:
        """Return the virtual time that any tenant would have if it began to wait now."""
        virtual_time = self._virtual_times.get(tenant, 0.0)
        if tenant in self._waiting or not self._waiting:
            return virtual_time
        return max(self._system_time, self._waiting.head()[0][0], virtual_time)

    def start_waiting(self, tenant: str) -> None:
        """Add a tenant that begins to wait; one that waits already changes nothing."""
        if tenant not in self._waiting:
            self._advance_system_time()
            start = max(self._system_time, self._virtual_times.get(tenant, 0.0))
            self._virtual_times[tenant] = start
            self._waiting.push(tenant, (start,))

    def stop_waiting(self, tenant: str) -> None:
        """Take out a tenant that waits for nothing any more."""
        self._advance_system_time()
        self._waiting.remove(tenant)
        if not self._waiting:
            self._virtual_times.clear()
            self._system_time = 0.0

    def charge_tokens(self, tenant: str, num_tokens: float, weight: float) -> bool:
        """Charge a tenant, or give back a negative number. Return True if the order may change.

        Nothing is charged while no other tenant waits.
        """
        is_waiting = tenant in self._waiting
        if len(self._waiting) <= is_waiting:
            return False
        charged = self._virtual_times.get(tenant, self._system_time) + num_tokens / weight
        if num_tokens < 0.0:
            charged = max(self._system_time, charged)
        self._virtual_times[tenant] = charged
        if is_waiting:
            self._advance_system_time()
            self._waiting.remove(tenant)
            self._waiting.push(tenant, (charged,))
        return is_waiting

    def _advance_system_time(self) -> None:
        if self._waiting:
            self._system_time = max(self._system_time, self._waiting.head()[0][0])


def charged_tokens(request: Request) -> int:
    """Return what a request is charged when it is placed, tokens: its prompt."""
    return request.num_prompt_tokens


def owed_tokens(request: Request, usage: Usage) -> int:
    """Return what a request is charged on top when it has ended, tokens; may be negative."""
    return usage.num_prompt_tokens + usage.num_output_tokens - charged_tokens(request)
