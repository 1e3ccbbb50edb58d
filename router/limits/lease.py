"""One budget for several gateways, exactly: what each may spend is leased to it.

One `LeaseServer` has the `RateLimiter`; each gateway has a `LeasedBudget` that looks like
one. Messages go one way at a time: a gateway's `News` (what it has sent, what
was answered, what it would like to send next), then the lessor's `Grant`.

    gateway: wants --news--> lessor: room? set aside --grant--> gateway: reserves
    gateway: sent, answered, ended --news--> lessor: the same in its budget

A grant is for the requests that wait, in their order, and for no more; what is
left of it when they went elsewhere returns with the next news. A gateway that
is silent for longer than its lease is taken to be dead: all it had is counted
as spent at that moment, the latest possible; by its own clock it stopped
spending before. A lessor that starts anew grants nothing until all that its
predecessor may have granted has left the window.

What never happens: a reservation from a lease that has run out; more set aside,
on its way and counted, over all gateways, than the limits allow.
"""

import math

import msgspec

from router.limits.rate_limit import Amount, RateLimiter, RateLimits, RateReport

LEASE_S = 5.0  # news come every second or sooner: four may be lost
_RENEW_S = 1.0
# Waiting requests that one message asks for.
_MAX_WANTED = 32
_GATHER_S = 0.05  # events that ask for nothing wait so long for others
_UNUSED_S = 0.5  # a grant that was not used by then was for requests that went elsewhere
_ROUND_TRIP_S = 0.002  # to a lessor on the same node; decides nothing but when to look again
_NOTHING = Amount()


class Event(msgspec.Struct, frozen=True, array_like=True):
    """What became of a request since the last news."""

    kind: str  # sent, counted, settled, refused, report
    request_id: str
    age_s: float  # how long ago, by the gateway's clock
    amount: Amount | None = None
    report: RateReport | None = None


class News(msgspec.Struct, frozen=True, kw_only=True):
    """From a gateway: what it did, what it has left, what it wants."""

    number: int  # grows by one; repeated if no answer came
    events: list[Event] = []
    left: Amount = _NOTHING  # of what was granted
    wanted: list[Amount] = []


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """To a gateway: what it may spend beside what it has left."""

    number: int  # of the news that it answers
    granted: Amount = _NOTHING
    room_s: float = 0.0  # when the next wanted request will have room, seconds from now
    state: dict[str, object] = {}


class _Gateway:
    __slots__ = ("grant", "heard_s", "left", "open_ids")

    def __init__(self) -> None:
        self.heard_s = -math.inf
        self.left = _NOTHING  # as far as we know
        self.open_ids: dict[str, None] = {}
        self.grant: Grant | None = None  # the last one


class LeaseServer:
    """The one that has the budget."""

    def __init__(self, limits: RateLimits, now_s: float, *, is_restart: bool) -> None:
        self.budget = RateLimiter(limits)
        self._gateways: dict[str, _Gateway] = {}
        if is_restart:
            # What was leased may be spent until the leases end, and then counts for a minute.
            self.budget.block(now_s + LEASE_S + 61.0)

    def hear(self, gateway_id: str, news: News, now_s: float) -> Grant:
        """Take in a gateway's news; the same news get the same answer."""
        self._bury_the_silent(now_s)
        gateway = self._gateways.setdefault(gateway_id, _Gateway())
        gateway.heard_s = now_s
        if gateway.grant is not None and gateway.grant.number == news.number:
            return gateway.grant
        # First free what was set aside, then count what was sent from it: in one call.
        self._set_aside(gateway_id, gateway, news.left, now_s)
        for event in news.events:
            self._take_in(gateway_id, gateway, event, now_s - max(0.0, event.age_s), now_s)
        granted, room_s = _NOTHING, 0.0
        for amount in news.wanted:
            room_s = self.budget.room_s(amount, now_s)
            if room_s > 0.0:
                break
            granted += amount
            self._set_aside(gateway_id, gateway, gateway.left + amount, now_s)
        gateway.grant = Grant(
            number=news.number,
            granted=granted,
            room_s=room_s,
            state=self.budget.state(now_s),
        )
        return gateway.grant

    def _take_in(
        self, gateway_id: str, gateway: _Gateway, event: Event, at_s: float, now_s: float
    ) -> None:
        key = f"{gateway_id}/{event.request_id}"
        if event.kind == "sent":
            if event.amount is not None and key not in gateway.open_ids:
                gateway.open_ids[key] = None
                self.budget.book(key, event.amount, at_s)
        elif event.kind == "counted":
            # By our own clock and now: a clock that runs ahead must not make it older.
            self.budget.count(key, now_s)
        elif event.kind == "settled":
            gateway.open_ids.pop(key, None)
            self.budget.settle(key, event.amount, now_s)
        elif event.kind == "refused":
            gateway.open_ids.pop(key, None)
            self.budget.refuse(key, event.report or RateReport(), now_s)
        elif event.report is not None:
            self.budget.report(event.report, now_s)

    def _set_aside(self, gateway_id: str, gateway: _Gateway, left: Amount, now_s: float) -> None:
        gateway.left = left
        self.budget.set_aside(gateway_id, left, now_s)

    def _bury_the_silent(self, now_s: float) -> None:
        """Count as spent what gateways had whose lease has run out."""
        for gateway_id, gateway in list(self._gateways.items()):
            if now_s < gateway.heard_s + LEASE_S:
                continue
            del self._gateways[gateway_id]
            left, self_id = gateway.left, f"{gateway_id}/lease"
            self.budget.set_aside(gateway_id, _NOTHING, now_s)
            if left.num_requests:
                self.budget.book(self_id, left, now_s)
                gateway.open_ids[self_id] = None
            for key in gateway.open_ids:
                self.budget.count(key, now_s)
                self.budget.settle(key, None, now_s)


class LeasedBudget:
    """A gateway's part of a budget that somebody else has.

    `want` what waits; send `news()` when `next_news_s` says so, one at a time,
    and hand the answer to `on_grant`, or call `on_no_answer`.
    """

    def __init__(self, limits: RateLimits) -> None:
        self.limits = limits
        self.num_refused = 0
        self._left = _NOTHING
        self._lease_until_s = -math.inf
        self._granted_s = -math.inf
        self._room_at_s = -math.inf  # by the last grant
        self._wanted: dict[str, Amount] = {}
        self._events: list[tuple[float, str, str, Amount | None, RateReport | None]] = []
        self._open: set[str] = set()
        self._number = 0
        self._under_way: tuple[News, float] | None = None
        self._repeat = False
        self._last_news_s = -math.inf
        self._lessors_state: dict[str, object] = {}

    @property
    def num_open(self) -> int:
        """Reservations of this gateway that have not ended."""
        return len(self._open)

    def use(self, limits: RateLimits) -> None:
        """Go by these limits from now on (the lessor has its own)."""
        self.limits = limits

    def room_s(self, amount: Amount, now_s: float) -> float:
        """When so much may be sent, seconds from now: 0 is now, inf never."""
        if amount.num_tokens > (self.limits.tpm or math.inf):
            return math.inf
        for most in (self.limits.max_cost_per_hour, self.limits.max_cost_per_day):
            if most is not None and amount.cost > most:
                return math.inf
        if now_s < self._lease_until_s and self._left.covers(amount):
            return 0.0
        return max(_ROUND_TRIP_S, self._room_at_s - now_s)

    def want(self, request_id: str, amount: Amount) -> None:
        """Ask for so much with the next news, after what was wanted before."""
        if len(self._wanted) < _MAX_WANTED:
            self._wanted[request_id] = amount

    def reserve(self, request_id: str, amount: Amount, now_s: float) -> None:
        """As `RateLimiter.reserve`."""
        if request_id in self._open:
            raise ValueError(f"request {request_id} has a reservation already")
        if now_s >= self._lease_until_s or not self._left.covers(amount):
            raise ValueError(f"no room for request {request_id}")
        self._left -= amount
        self._wanted.pop(request_id, None)
        self._open.add(request_id)
        self._add("sent", request_id, now_s, amount)

    def count(self, request_id: str, now_s: float) -> None:
        """As `RateLimiter.count`."""
        if request_id in self._open:
            self._add("counted", request_id, now_s)

    def settle(self, request_id: str, counted: Amount | None, now_s: float) -> None:
        """As `RateLimiter.settle`."""
        if request_id in self._open:
            self._open.discard(request_id)
            self._add("settled", request_id, now_s, counted)

    def refuse(self, request_id: str, report: RateReport, now_s: float) -> None:
        """As `RateLimiter.refuse`; the rest of the grant is not spent until the lessor knows."""
        self.num_refused += 1
        self._left = _NOTHING
        self._room_at_s = max(self._room_at_s, now_s + (report.retry_after_s or 0.0))
        if request_id in self._open:
            self._open.discard(request_id)
            self._add("refused", request_id, now_s, report=report)

    def report(self, report: RateReport, now_s: float) -> None:
        """As `RateLimiter.report`."""
        self._add("report", "", now_s, report=report)

    def next_news_s(self) -> float | None:
        """When to send `news`, on the gateway's clock; None: not before something happens."""
        if self._under_way is not None:
            return self._last_news_s + _RENEW_S if self._repeat else None
        due_s = math.inf
        if self._wanted:
            due_s = self._room_at_s
        if self._events:
            due_s = min(due_s, self._events[0][0] + _GATHER_S)
        if self._open or self._left.num_requests:
            due_s = min(due_s, self._last_news_s + _RENEW_S)
        return None if math.isinf(due_s) and due_s > 0 else due_s

    def news(self, now_s: float) -> News:
        """What to tell the lessor now; after `on_no_answer`, the same again."""
        self._last_news_s = now_s
        if self._under_way is not None:
            self._repeat = False
            return self._under_way[0]
        if now_s >= min(self._lease_until_s, self._granted_s + _UNUSED_S):
            self._left = _NOTHING
        self._number += 1
        news = News(
            number=self._number,
            events=[
                Event(kind, request_id, now_s - at_s, amount, report)
                for at_s, kind, request_id, amount, report in self._events
            ],
            left=self._left,
            wanted=list(self._wanted.values()),
        )
        self._events, self._wanted = [], {}
        self._under_way = (news, now_s)
        return news

    def on_grant(self, grant: Grant, now_s: float) -> None:
        """Take in the lessor's answer."""
        if self._under_way is None or grant.number != self._under_way[0].number:
            return
        news, sent_s = self._under_way
        self._under_way = None
        self._lease_until_s = sent_s + LEASE_S  # the lessor counts from later
        if news.wanted:
            self._room_at_s = now_s + grant.room_s
        self._wanted.clear()  # whoever still waits will want again
        self._lessors_state = grant.state
        if grant.granted.num_requests:
            self._granted_s = now_s
            if now_s < self._lease_until_s:
                self._left += grant.granted

    def on_no_answer(self) -> None:
        """The lessor has not answered: say the same again, in a while."""
        self._repeat = True

    def state(self, now_s: float) -> dict[str, object]:
        """The lessor's last word on the whole budget, and what is leased; JSON-able."""
        is_leased = now_s < self._lease_until_s
        return {**self._lessors_state, "leased": self._left.num_requests if is_leased else 0}

    def _add(
        self,
        kind: str,
        request_id: str,
        now_s: float,
        amount: Amount | None = None,
        report: RateReport | None = None,
    ) -> None:
        self._events.append((now_s, kind, request_id, amount, report))
