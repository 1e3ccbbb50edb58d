r"""Who waits in the gateway for an engine to have room, and who of them is next?

    (none) --push--> held --remove: placed, spilled, evicted, or its client left--> (none)
                       \--expire: held too long--> (none)

What never happens: a request that is held twice, or in the queues of two models; a
request never placed before that is held past the bounds.
"""

import math
from collections.abc import Collection, Iterator
from typing import Final

import msgspec

from router.core.settings import RouterSettings
from router.queueing.bounds import QueueBounds
from router.queueing.deadline import edf_key_s, ttft_deadline_s
from router.queueing.fair_share import FairShare, charged_tokens, owed_tokens
from router.queueing.held_classes import HeldClassState, held_classes
from router.queueing.lazy_heap import Key, LazyHeap
from router.queueing.model_queue import ModelQueue, queue_name
from router.types import Request, RequestClass, Usage

_BATCH: Final = RequestClass.BATCH  # looked up once: that costs 0.1 µs each time (Python 3.11)


class HoldQueueState(msgspec.Struct, frozen=True, kw_only=True):
    """How full the hold queue is."""

    num_requests: int
    num_tokens: int  # of their prompts
    num_bytes: int  # of their bodies
    num_tokens_by_model: dict[str, int]
    by_class: dict[str, HeldClassState]  # of which something is held


class HoldQueue:
    """One queue per model name: by virtual time of the tenant, EDF key, arrival; bounded.

    By its EDF key (`router.queueing.deadline`) a short question passes a long document.
    Between tenants, tokens decide (`router.queueing.fair_share`), but batch work whose TTFT
    deadline has not come yet goes after all other work of everybody. With one tenant that
    changes nothing. There is a queue per model because a model whose engines have no room
    must not hide another model whose engines have room; and one per model for its suspects, which
    wait for an engine alone. Where a model is asked for, `queue_name` is meant.
    """

    __slots__ = (
        "_bounds",
        "_expiry",
        "_held",
        "_keys",
        "_model_queues",
        "_models_by_tenant",
        "_settings",
        "_share",
        "_yielding",
        "by_arrival",
        "num_tokens_by_model",
    )

    def __init__(self, settings: RouterSettings) -> None:
        self._settings = settings
        self._held: dict[str, Request] = {}
        self._keys: dict[str, Key] = {}  # of what is held, in the present order
        self._model_queues: dict[str, ModelQueue] = {}  # only those that are not empty
        self._expiry = LazyHeap()
        self._share = FairShare()
        self._bounds = QueueBounds(settings)
        self._models_by_tenant: dict[str, set[str]] = {}  # models that each tenant waits for
        self._yielding = LazyHeap()  # batch requests before their TTFT deadline
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
        return self._bounds.num_tokens

    @property
    def num_bytes(self) -> int:
        """Bytes of request bodies held."""
        return self._bounds.num_bytes

    def get(self, request_id: str) -> Request | None:
        """Return the request of this id, None if it is not held."""
        return self._held.get(request_id)

    def key(self, request: Request) -> Key:
        """Return a request's place in the order: (EDF key, arrival), seconds; lower is first."""
        key = self._keys.get(request.id)
        return key if key is not None else self._new_key(request)

    def _new_key(self, request: Request) -> Key:
        if self.by_arrival:
            return (request.arrival_s, request.arrival_s)
        return (edf_key_s(request, self._settings), request.arrival_s)

    def reorder(self, *, by_arrival: bool) -> None:
        """Order by arrival alone, or by EDF key, from now on, including what is held already."""
        if by_arrival == self.by_arrival:
            return
        self.by_arrival = by_arrival
        self._model_queues = {name: ModelQueue() for name in self._model_queues}
        for request in self._held.values():
            key = self._keys[request.id] = self._new_key(request)
            self._model_queues[queue_name(request)].push(request, key)
        for tenant in self._models_by_tenant:
            self._update_virtual_times(tenant)

    def expires_s(self, request: Request) -> float:
        """Return when the request may be held no longer, seconds: its own deadline or our bound.

        A request that an engine did not complete is held anew from when the engine gave up.
        """
        max_hold_s = self._settings.max_hold_s
        if request.tried:
            # A suspect may have to wait for an engine to start.
            suspect_hold_s = self._settings.suspect_hold_s if request.is_suspect else 0.0
            return request.retried_s + max(max_hold_s, suspect_hold_s)
        return min(request.deadline_s, request.arrival_s + max_hold_s)

    def push(self, request: Request) -> bool:
        """Hold a request. Return False if a bound leaves no room for it.

        One that was placed before is held whatever the bounds say, because its reply
        may have begun. There are no more of these than engines have sequences.
        Raises `ValueError` if a request of this id is held already.
        """
        if request.id in self._held:
            raise ValueError(f"request {request.id} is held already")
        if not request.was_placed and not self._bounds.has_room(request):
            return False
        self._held[request.id] = request
        self._bounds.add(request)
        name = queue_name(request)
        model_queue = self._model_queues.get(name)
        if model_queue is None:
            model_queue = self._model_queues[name] = ModelQueue()
            self.num_tokens_by_model[name] = 0
        self.num_tokens_by_model[name] += request.num_prompt_tokens
        if request.priority_class is _BATCH:
            self._yielding.push(request.id, (ttft_deadline_s(request, self._settings),))
        key = self._keys[request.id] = self._new_key(request)
        model_queue.push(request, key)
        self._share.start_waiting(request.tenant)
        self._models_by_tenant.setdefault(request.tenant, set()).add(name)
        self._update_virtual_time(model_queue, request.tenant)
        self._expiry.push(request.id, (self.expires_s(request),))
        return True

    def make_room(self, request: Request) -> list[Request]:
        """Evict requests of other tenants so that this one can be held, and return them.

        [] if it should not be held: see `router.queueing.bounds`.
        """
        evicted = self._bounds.eviction_candidates(request)
        for each in evicted:
            self.remove(each.id)
        return evicted

    def remove(self, request_id: str) -> Request | None:
        """Remove a request and return it; None if it was not held."""
        request = self._held.pop(request_id, None)
        if request is None:
            return None
        self._bounds.remove(request)
        name = queue_name(request)
        self.num_tokens_by_model[name] -= request.num_prompt_tokens
        model_queue = self._model_queues[name]
        self._yielding.remove(request_id)
        if model_queue.remove(request, self._keys.pop(request_id)):
            self._update_virtual_time(model_queue, request.tenant)
        else:
            models = self._models_by_tenant[request.tenant]
            models.remove(name)
            if not models:
                del self._models_by_tenant[request.tenant]
                self._share.stop_waiting(request.tenant)
        if not model_queue:
            del self._model_queues[name], self.num_tokens_by_model[name]
        self._expiry.remove(request_id)
        return request

    def charge_prompt(self, request: Request) -> None:
        """Charge a tenant for the prompt of a request that is placed, held before or not."""
        if self._held and self._share.charge_tokens(
            request.tenant, charged_tokens(request), request.weight
        ):
            self._update_virtual_times(request.tenant)

    def record_usage(self, request: Request, usage: Usage) -> None:
        """Charge a tenant for what a placed request used beyond its prompt, or give it back."""
        if self._held and self._share.charge_tokens(
            request.tenant, owed_tokens(request, usage), request.weight
        ):
            self._update_virtual_times(request.tenant)

    def heads(self, skipped: Collection[str] = ()) -> list[Request]:
        """Return the first request of each queue, the first of all last; skipped ones aside."""
        if self.num_tenants == 1 and len(self._model_queues) == 1:
            for model, model_queue in self._model_queues.items():
                return [] if model in skipped else [self._held[model_queue.first_id()]]
        heads = [
            model_queue.head()
            for model, model_queue in self._model_queues.items()
            if model not in skipped
        ]
        if self.num_tenants == 1:
            ids = [request_id for _, request_id in sorted((key, id_) for _, key, id_ in heads)]
        else:
            ids = [request_id for _, _, request_id in sorted(heads)]
        ids.reverse()
        return [self._held[request_id] for request_id in ids]

    def num_tokens_before(self, request: Request) -> int:
        """Return the prompt tokens held that are to go before this request, about.

        Those of its own tenant with a lower EDF key, or one hardly higher. And of each
        other tenant that waits for the model, what its share comes to until then.
        """
        model_queue = self._model_queues.get(queue_name(request))
        if model_queue is None:
            return 0
        num_own = model_queue.num_tokens_before(request.tenant, self.key(request))
        if self.num_tenants == 1 and request.tenant in model_queue.virtual_times:
            return num_own
        yields = request.priority_class is _BATCH
        until = self._share.entry_virtual_time(request.tenant) + num_own / request.weight
        num_tokens = num_own
        for other, (other_yields, virtual_time) in model_queue.virtual_times.items():
            if other == request.tenant or virtual_time > until or (other_yields and not yields):
                continue
            first = self._held[model_queue.first_id_of(other)]
            num_share = (until - virtual_time) * first.weight + charged_tokens(first)
            num_tokens += min(model_queue.num_tokens(other), math.ceil(num_share))
        return num_tokens

    def num_held(self, model: str) -> int:
        """Return how many requests are held for this model name."""
        model_queue = self._model_queues.get(model)
        return len(model_queue) if model_queue is not None else 0

    def num_held_of(self, models: Collection[str] | None) -> tuple[int, int]:
        """Return how many requests are held for any of these models, and their prompts' tokens.

        None: of all. Those that wait for certain engines are among them.
        """
        if models is None:
            return len(self._held), self.num_tokens
        num_requests = num_tokens = 0
        for name, model_queue in self._model_queues.items():
            if self._held[model_queue.first_id()].model in models:
                num_requests += len(model_queue)
                num_tokens += self.num_tokens_by_model[name]
        return num_requests, num_tokens

    def is_head(self, request: Request) -> bool:
        """Whether the request is held and the first of those for its model."""
        model_queue = self._model_queues.get(queue_name(request))
        return model_queue is not None and model_queue.first_id() == request.id

    def in_order(self, model: str) -> Iterator[Request]:
        """Return an iterator over the requests held for a model, the first one first."""
        model_queue = self._model_queues.get(model)
        return model_queue.in_order(self._held) if model_queue is not None else iter(())

    def front(self, model: str, num_requests: int) -> list[Request]:
        """Return the first so many requests held for a model, or more, in order.

        The same list as long as nothing at the front changes; it is not to be changed.
        """
        model_queue = self._model_queues.get(model)
        return model_queue.front(num_requests, self._held) if model_queue is not None else []

    def next_expiry_s(self) -> float | None:
        """Return when the first request will have been held too long; None if none is held."""
        return self._expiry.head()[0][0] if self._held else None

    def expire(self, now_s: float) -> list[Request]:
        """Remove the requests held too long by now and return them, the longest due first.

        Batch work whose TTFT deadline has come by now yields no more.
        """
        while self._yielding and (head := self._yielding.head())[0][0] <= now_s:
            self._yielding.remove(head[1])
            due = self._held[head[1]]
            self._update_virtual_time(self._model_queues[queue_name(due)], due.tenant)
        expired = []
        while self._held and (head := self._expiry.head())[0][0] <= now_s:
            request = self.remove(head[1])
            assert request is not None  # the heaps and `_held` name the same ids
            expired.append(request)
        return expired

    def state(self, now_s: float) -> HoldQueueState:
        """Return how full it is, and of what."""
        return HoldQueueState(
            num_requests=len(self._held),
            num_tokens=self.num_tokens,
            num_bytes=self.num_bytes,
            num_tokens_by_model=dict(self.num_tokens_by_model),
            by_class=held_classes(self._held.values(), self._settings, now_s),
        )

    def _update_virtual_times(self, tenant: str) -> None:
        for model in self._models_by_tenant[tenant]:
            self._update_virtual_time(self._model_queues[model], tenant)

    def _update_virtual_time(self, model_queue: ModelQueue, tenant: str) -> None:
        yields = False
        if self._yielding:
            yields = model_queue.first_id_of(tenant) in self._yielding
        model_queue.set_virtual_time(tenant, (yields, self._share.virtual_time(tenant)))
