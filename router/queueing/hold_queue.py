"""Requests that wait in the gateway for an engine to have room."""

import math
from collections.abc import Collection, Iterator

from router.queueing.bounds import QueueBounds
from router.queueing.deadline import edf_key_s, ttft_deadline_s
from router.queueing.fair_share import FairShare, charged_tokens, owed_tokens
from router.queueing.lazy_heap import Key, LazyHeap
from router.queueing.model_queue import ModelQueue
from router.settings import RouterSettings
from router.types import Request, RequestClass, Usage


class HoldQueue:
    """Bounded; by tenant's turn, promised first token, arrival; one lane per model name.

    By promise (`router.queueing.deadline`) a short question passes a long document, and as
    promises only age nothing starves (earliest deadline first, Liu and Layland
    1973). Between tenants, tokens decide (`router.queueing.fair_share`), but batch work
    whose promise is not due yet goes after everybody's other work. With one
    tenant that changes nothing. Lanes, because a
    model that has no room must not hide another that has. A request is in no
    lane or in exactly one, and leaves it by `remove` or `expire` alone.
    """

    __slots__ = (
        "_expiry",
        "_held",
        "_lanes",
        "_models_by_tenant",
        "_occupancy",
        "_settings",
        "_share",
        "_yielding",
        "by_arrival",
        "num_tokens_by_model",
    )

    def __init__(self, settings: RouterSettings) -> None:
        self._settings = settings
        self._held: dict[str, Request] = {}
        self._lanes: dict[str, ModelQueue] = {}  # only those that are not empty
        self._expiry = LazyHeap()
        self._share = FairShare()
        self._occupancy = QueueBounds(settings)
        self._models_by_tenant: dict[str, set[str]] = {}  # that each waits for
        self._yielding = LazyHeap()  # batch requests whose promise is not due yet
        self.by_arrival = False  # order by arrival alone; changed by `reorder`
        self.num_tokens_by_model: dict[str, int] = {}  # prompt tokens held

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._held

    @property
    def num_tenants(self) -> int:
        """Tenants that wait."""
        return self._share.num_waiting

    @property
    def num_tokens(self) -> int:
        """Prompt tokens held."""
        return self._occupancy.num_tokens

    @property
    def num_bytes(self) -> int:
        """Bytes of bodies held."""
        return self._occupancy.num_bytes

    def get(self, request_id: str) -> Request | None:
        """The request of this id, None if it is not held."""
        return self._held.get(request_id)

    def key(self, request: Request) -> Key:
        """Place in the order: (turn, arrival), seconds; see `router.queueing.deadline`."""
        if self.by_arrival:
            return (request.arrival_s, request.arrival_s)
        return (edf_key_s(request, self._settings), request.arrival_s)

    def reorder(self, *, by_arrival: bool) -> None:
        """Order by arrival alone, or by promise, from now on; what is held already, too."""
        if by_arrival == self.by_arrival:
            return
        self.by_arrival = by_arrival
        self._lanes = {model: ModelQueue() for model in self._lanes}
        for request in self._held.values():
            self._lanes[request.model].push(request, self.key(request))
        for tenant in self._models_by_tenant:
            self._set_turns(tenant)

    def expires_s(self, request: Request) -> float:
        """When the request may be held no longer: its own deadline or our bound.

        One that an engine did not carry through is held anew: it had its turn.
        """
        max_hold_s = self._settings.max_hold_s
        if request.tried:
            return request.retried_s + max_hold_s
        return min(request.deadline_s, request.arrival_s + max_hold_s)

    def push(self, request: Request) -> bool:
        """Whether the request is held now; False if a bound leaves no room for it.

        One that was placed before is taken back whatever the bounds say: its reply
        may have begun. There are no more of these than engines have sequences.
        Raises `ValueError` if a request of this id is held already.
        """
        if request.id in self._held:
            raise ValueError(f"request {request.id} is held already")
        if not request.tried and not self._occupancy.has_room(request):
            return False
        self._held[request.id] = request
        self._occupancy.add(request)
        lane = self._lanes.get(request.model)
        if lane is None:
            lane = self._lanes[request.model] = ModelQueue()
            self.num_tokens_by_model[request.model] = 0
        self.num_tokens_by_model[request.model] += request.num_prompt_tokens
        if request.priority_class is RequestClass.BATCH:
            self._yielding.push(request.id, (ttft_deadline_s(request, self._settings),))
        lane.push(request, self.key(request))
        self._share.join(request.tenant)
        self._models_by_tenant.setdefault(request.tenant, set()).add(request.model)
        self._set_turn(lane, request.tenant)
        self._expiry.push(request.id, (self.expires_s(request),))
        return True

    def make_room(self, request: Request) -> list[Request]:
        """Requests of others, held no longer, so that this one can be; empty if it should not.

        Of those who take most of the queue over their weight (`router.queueing.bounds`).
        """
        leaving = self._occupancy.eviction_candidates(request)
        for each in leaving:
            self.remove(each.id)
        return leaving

    def remove(self, request_id: str) -> Request | None:
        """The request, held no longer; None if it was not."""
        request = self._held.pop(request_id, None)
        if request is None:
            return None
        self._occupancy.remove(request)
        self.num_tokens_by_model[request.model] -= request.num_prompt_tokens
        lane = self._lanes[request.model]
        self._yielding.remove(request_id)
        if lane.remove(request, self.key(request)):
            self._set_turn(lane, request.tenant)
        else:
            models = self._models_by_tenant[request.tenant]
            models.remove(request.model)
            if not models:
                del self._models_by_tenant[request.tenant]
                self._share.leave(request.tenant)
        if not lane:
            del self._lanes[request.model], self.num_tokens_by_model[request.model]
        self._expiry.remove(request_id)
        return request

    def charge(self, request: Request) -> None:
        """Count a request that is placed, held before or not, as its tenant's."""
        if self._held and self._share.charge(
            request.tenant, charged_tokens(request), request.weight
        ):
            self._set_turns(request.tenant)

    def settle(self, request: Request, usage: Usage) -> None:
        """Count what a placed request took beyond what it was charged."""
        if self._held and self._share.charge(
            request.tenant, owed_tokens(request, usage), request.weight
        ):
            self._set_turns(request.tenant)

    def head(self, skipped: Collection[str] = ()) -> Request | None:
        """The most urgent request, lanes of the skipped models aside; None if there is none."""
        heads = [lane.head() for model, lane in self._lanes.items() if model not in skipped]
        if not heads:
            return None
        if self.num_tenants == 1:
            return self._held[min(head[1:] for head in heads)[1]]
        return self._held[min(heads)[2]]

    def num_tokens_before(self, request: Request) -> int:
        """Prompt tokens held that are to go before this request, about.

        Its tenant's that are promised before it, or hardly after; and of each other
        tenant that waits for the model what its turns come to until then.
        """
        lane = self._lanes.get(request.model)
        if lane is None:
            return 0
        own = lane.num_tokens_before(request.tenant, self.key(request))
        if self.num_tenants == 1 and request.tenant in lane.turns:
            return own
        yields = request.priority_class is RequestClass.BATCH
        tag = self._share.entry_tag(request.tenant) + own / request.weight
        num_tokens = own
        for other, (other_yields, other_tag) in lane.turns.items():
            if other == request.tenant or other_tag > tag or (other_yields and not yields):
                continue
            first = self._held[lane.first_of(other)]
            num_turns = (tag - other_tag) * first.weight + charged_tokens(first)
            num_tokens += min(lane.num_tokens(other), math.ceil(num_turns))
        return num_tokens

    def num_held(self, model: str) -> int:
        """Requests held for this model name."""
        lane = self._lanes.get(model)
        return len(lane) if lane is not None else 0

    def is_head(self, request: Request) -> bool:
        """Whether the request is held and the most urgent of its lane."""
        lane = self._lanes.get(request.model)
        return lane is not None and lane.head()[2] == request.id

    def in_order(self, model: str) -> Iterator[Request]:
        """The requests waiting for a model, most urgent first, found one by one."""
        lane = self._lanes.get(model)
        return lane.in_order(self._held) if lane is not None else iter(())

    def next_expiry_s(self) -> float | None:
        """When the first request will have been held too long; None if none is held."""
        return self._expiry.head()[0][0] if self._held else None

    def expire(self, now_s: float) -> list[Request]:
        """The requests held too long by now, taken out, the longest due first.

        Batch work whose promise is due by now yields no more.
        """
        while self._yielding and (head := self._yielding.head())[0][0] <= now_s:
            self._yielding.remove(head[1])
            due = self._held[head[1]]
            self._set_turn(self._lanes[due.model], due.tenant)
        expired = []
        while self._held and (head := self._expiry.head())[0][0] <= now_s:
            request = self.remove(head[1])
            assert request is not None  # the heaps and `_held` name the same ids
            expired.append(request)
        return expired

    def state(self) -> dict[str, object]:
        """How full it is, for people to read; JSON-able."""
        return {
            "num_requests": len(self._held),
            "num_tokens": self.num_tokens,
            "num_bytes": self.num_bytes,
            "num_tokens_by_model": dict(self.num_tokens_by_model),
        }

    def _set_turns(self, tenant: str) -> None:
        for model in self._models_by_tenant[tenant]:
            self._set_turn(self._lanes[model], tenant)

    def _set_turn(self, lane: ModelQueue, tenant: str) -> None:
        lane.set_turn(tenant, (lane.first_of(tenant) in self._yielding, self._share.tag(tenant)))
