"""Which way did the last requests take, and why did they wait? For `/headway/requests/ID`.

What is kept is bounded: the last requests that are over, as references to what was noted of them
anyhow, and how the engines looked when requests were held, a few times a second. It becomes words
only when somebody asks.
"""

import collections
import datetime
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from router import Request, RouterState, Usage
from router.fleet.admission import kv_need_tokens
from router.fleet.replica import ReplicaState
from router.resilience.breaker import BreakerState
from serving.gateway.exchange import Exchange
from serving.gateway.observe.journey import Journey, Look
from serving.gateway.observe.observer import reason_of

_MAX_KEPT = 1000  # some 2 KB each
MAX_LISTED = 100
# How the engines look is asked no more often, and not for more than this share of a core: of a
# fleet of hundreds it takes tens of milliseconds.
_LOOK_EVERY_S = 0.25
_MAX_SHARE = 0.01


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing that happened to a request."""

    after_s: float  # since it arrived, seconds
    what: str  # arrived, chosen, held, sent, first_token, over
    why: str = ""  # in words
    where: str = ""  # the engine or provider; the model, where a route has chosen it
    predicted_ttft_s: float | None = None  # there, seconds from when it was sent there


class RequestWay(msgspec.Struct, frozen=True):
    """A request, sizes and times: never what it says."""

    id: str  # the client's, or drawn by us: the reply's `x-request-id`
    model: str
    tenant: str
    request_class: str
    num_prompt_tokens: int  # as engines count them once it is over, estimated before
    num_output_tokens: int | None  # None until it is over, and where nobody told
    arrived: datetime.datetime
    is_over: bool
    outcome: str  # empty while it is open
    status: int  # of the reply; 0 while it is open, and where the client left before it had one
    events: list[Event]
    gateway: int = 0  # that had it, by rank


class _Over(msgspec.Struct, frozen=True):
    """What is kept of a request that is over: not its body."""

    id: str
    request: Request
    journey: Journey
    usage: Usage | None
    tenant: str
    status: int
    error: str


class Recent:
    """Keeps the last requests that are over, and finds the open ones."""

    def __init__(
        self,
        open_requests: Mapping[str, Exchange],
        router_state: Callable[[float], RouterState],
        max_kept: int = _MAX_KEPT,
    ) -> None:
        """`open_requests` are those of the driver, by their ids in the router."""
        self._open = open_requests
        self._router_state = router_state
        self._over: collections.deque[_Over] = collections.deque(maxlen=max_kept)
        self._next_look_s = float("-inf")
        self._looks: dict[str, Look] = {}  # of the last time, by model

    def on_hold(self, exchange: Exchange, now_s: float) -> None:
        """Note why a request is held, the first time that it is."""
        if exchange.journey.held_by is not None:
            return
        if now_s >= self._next_look_s:
            began_s = time.thread_time()
            self._looks = _looks(self._router_state(now_s))
            took_s = time.thread_time() - began_s
            self._next_look_s = now_s + max(_LOOK_EVERY_S, took_s / _MAX_SHARE)
        model = exchange.request.model
        exchange.journey.held_by = self._looks.get(model) or Look(0, [])

    def on_over(
        self, request_id: str, exchange: Exchange, tenant: str, status: int, error: Exception | None
    ) -> None:
        """Keep a request that is over; `error` is what the client was told for an answer."""
        request = exchange.request
        if request.prefix_hashes or request.block_hashes or request.wording:
            # Up to 10 KB, and of no use here.
            request = msgspec.structs.replace(
                request, prefix_hashes=(), block_hashes=(), wording=()
            )
        self._over.append(
            _Over(
                request_id,
                request,
                exchange.journey,
                exchange.usage,
                tenant,
                status,
                reason_of(error),
            )
        )

    def ended(self) -> Iterator[tuple[Request, Journey, Usage | None]]:
        """Yield what is known of each request that is over and went to the router."""
        for each in self._over:
            yield each.request, each.journey, each.usage

    def find(self, request_id: str) -> RequestWay | None:
        """Return the way of a request, by the id in its reply or by the router's own."""
        for each in reversed(self._over):
            if request_id in (each.id, each.request.id):
                return _way_of(each, is_over=True)
        for exchange in self._open.values():
            if request_id in (exchange.request.id, _client_id(exchange)):
                return _way_of(_still_open(exchange), is_over=False)
        return None

    def last(self, max_listed: int = MAX_LISTED) -> list[RequestWay]:
        """Return the last requests, the newest first, open ones before those that are over."""
        ways = [_way_of(_still_open(each), is_over=False) for each in self._open.values()]
        ways = ways[-max_listed:][::-1]
        for each in reversed(self._over):
            if len(ways) >= max_listed:
                break
            ways.append(_way_of(each, is_over=True))
        return ways


def newest(ways: Sequence[list[RequestWay]]) -> list[RequestWay]:
    """Return what gateways list as one list in the same order, and no longer."""
    if len(ways) == 1:
        return ways[0]
    together = [way for each in ways for way in each]
    together.sort(key=lambda way: (way.is_over, -way.arrived.timestamp()))
    return together[:MAX_LISTED]


def _looks(state: RouterState) -> dict[str, Look]:
    engines: dict[str, list[ReplicaState]] = {}
    for replica in state.replicas.values():
        for name in (replica.info.model, *replica.info.aliases):
            engines.setdefault(name, []).append(replica)
    return {model: Look(state.held.num_requests, found) for model, found in engines.items()}


def _client_id(exchange: Exchange) -> str:
    """Return the id that the client knows: it is passed on to engines."""
    found = dict(exchange.headers).get(b"x-request-id")
    return found.decode("latin-1") if found is not None else exchange.request.id


def _still_open(exchange: Exchange) -> _Over:
    request = exchange.request
    return _Over(
        _client_id(exchange), request, exchange.journey, exchange.usage, request.tenant, 0, ""
    )


def _way_of(kept: _Over, *, is_over: bool) -> RequestWay:
    request, journey = kept.request, kept.journey
    now_s = time.monotonic()
    arrived = datetime.datetime.now(datetime.UTC) - datetime.timedelta(
        seconds=now_s - request.arrival_s
    )
    usage, outcome = kept.usage, journey.outcome
    return RequestWay(
        id=kept.id,
        model=request.model,
        tenant=kept.tenant,
        request_class=request.priority_class.value,
        num_prompt_tokens=usage.num_prompt_tokens if usage else request.num_prompt_tokens,
        num_output_tokens=usage.num_output_tokens if usage else None,
        arrived=arrived,
        is_over=is_over,
        outcome=outcome.value if outcome is not None else "",
        status=kept.status,
        events=_events(kept, is_over=is_over),
    )


def _events(kept: _Over, *, is_over: bool) -> list[Event]:
    """Return what happened, in its order."""
    request, journey = kept.request, kept.journey
    arrival_s = request.arrival_s
    events = [Event(0.0, "arrived")]
    if (chosen := journey.chosen) is not None:
        events.append(Event(0.0, "chosen", f"{chosen.route}: {chosen.why}", chosen.model))
    if journey.held_by is not None:
        events.append(Event(0.0, "held", why_held(request, journey.held_by)))
    for number, (place, sent_s) in enumerate(journey.places):
        answers = place == journey.answered_by
        events.append(
            Event(
                _rounded(sent_s - arrival_s),
                "sent",
                "" if number == 0 else "again: the one before it failed, or was slow",
                place,
                _rounded(journey.predicted_ttft_s)
                if answers and journey.predicted_ttft_s
                else None,
            )
        )
    if journey.first_token_s:
        after_s = _rounded(journey.first_token_s - arrival_s)
        events.append(Event(after_s, "first_token", "", journey.answered_by))
    if is_over:
        end_s = (journey.over_s or time.monotonic()) - arrival_s
        events.append(Event(_rounded(end_s), "over", journey.reason or kept.error))
    return sorted(events, key=lambda event: event.after_s)


def why_held(request: Request, look: Look) -> str:
    """Return in words why no engine got a request, by how the engines looked at that time."""
    if not look.engines:
        return f"no engine of {request.model} was connected"
    counts: collections.Counter[str] = collections.Counter(
        _obstacle(request, replica) for replica in look.engines
    )
    words = ", ".join(f"{number} {obstacle}" for obstacle, number in counts.most_common())
    others = f"; {look.num_held - 1:,} others were held" if look.num_held > 1 else ""
    return f"of {len(look.engines)} engines {words}{others}"


def _obstacle(request: Request, replica: ReplicaState) -> str:
    """Return what kept a request from an engine, as far as can be told afterwards."""
    if replica.is_draining:
        return "drained"
    if replica.breaker.state is BreakerState.OPEN:
        return "failed (its breaker was open)"
    if replica.is_mute:
        return "sent no news"
    if replica.is_quarantined:
        return "tried a suspect request alone"
    info, snapshot = replica.info, replica.snapshot
    if replica.num_free_kv_tokens < kv_need_tokens(request):
        return "had no room in the KV cache"
    if replica.num_pending_prefill_tokens >= info.max_num_batched_tokens:
        return "had a whole step of prompts to compute"
    num_running = snapshot.num_running_reqs if snapshot is not None else 0
    if max(num_running, replica.ledger.num_open) >= info.max_num_seqs:
        return "ran as many sequences as it may"
    return "had to take others first, or is kept for one"


def _rounded(seconds: float) -> float:
    return round(max(0.0, seconds), 6)
