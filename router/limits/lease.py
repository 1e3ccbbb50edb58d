"""How do several gateways share one key's limits, exactly?

One `LeaseServer` has the key's `RateLimiter`; each gateway has a `LeasedLimiter` that is
used like one. A gateway sends a `LeaseUpdate` (what it has sent, what was answered, what it
would like to send next), one at a time; the lease server answers it with a `LeaseGrant`.

    gateway: requests wait         --update--> lease server: is there room? lease --grant-->
    gateway: reserves from its lease
    gateway: sent, answered, ended --update--> lease server: the same in its limiter

A grant is for the requests that wait, in their order, and for no more. What is left of it
when they went elsewhere returns with the next update. A gateway that is silent for longer
than its lease is taken to be dead: all it had is counted as sent at that moment, the latest
possible; by its own clock it stopped sending before. A lease server that starts anew grants
nothing until all that its predecessor may have granted has left the window.

What never happens: a reservation from a lease that has run out; more leased, in flight and
counted, over all gateways, than the limits allow.
"""

import math
from typing import Literal

import msgspec

from router.limits.rate_limit import Amount, RateLimiter, RateLimiterState, RateReport
from router.limits.settings import RateLimits

LEASE_S = 5.0  # an update comes every second or sooner: four may be lost
_RENEW_S = 1.0
# Waiting requests that one update asks for.
_MAX_WAITING = 32
_GATHER_S = 0.05  # events that ask for nothing wait this long for others
_UNUSED_S = 0.5  # a grant that was not used by then was for requests that went elsewhere
_ROUND_TRIP_S = 0.002  # to a server on the same node; decides only when to look again
_NOTHING = Amount()

EventKind = Literal["sent", "counted", "ended", "refused", "report"]


class LeaseEvent(msgspec.Struct, frozen=True, array_like=True):
    """What became of a request since the last update."""

    kind: EventKind
    request_id: str
    age_s: float  # how long ago, by the gateway's clock
    amount: Amount | None = None
    report: RateReport | None = None


class LeaseUpdate(msgspec.Struct, frozen=True, kw_only=True):
    """From a gateway: what it did, what it has left, what waits there."""

    number: int  # grows by one; repeated if no answer came
    events: list[LeaseEvent] = []
    left: Amount = _NOTHING  # of what was granted
    waiting: list[Amount] = []  # one of each request


class LeaseGrant(msgspec.Struct, frozen=True, kw_only=True):
    """To a gateway: what it may send beside what it has left."""

    number: int  # of the update that it answers
    granted: Amount = _NOTHING
    wait_s: float = 0.0  # until the next waiting request has room, seconds
    state: RateLimiterState  # of all gateways together


class _Gateway:
    """What the lease server knows of one gateway."""

    __slots__ = ("heard_s", "last_grant", "left", "reservation_ids")

    def __init__(self) -> None:
        self.heard_s = -math.inf
        self.left = _NOTHING  # of what was granted, as far as we know
        self.reservation_ids: dict[str, None] = {}
        self.last_grant: LeaseGrant | None = None


class LeaseServer:
    """Leases parts of one rate limiter to gateways."""

    def __init__(self, limits: RateLimits, now_s: float, *, is_restart: bool) -> None:
        self.limiter = RateLimiter(limits)
        self._gateways: dict[str, _Gateway] = {}
        if is_restart:
            # What was leased may be sent until the leases end, and then counts for a minute.
            self.limiter.pause_until(now_s + LEASE_S + 61.0)

    def answer_update(self, gateway_id: str, update: LeaseUpdate, now_s: float) -> LeaseGrant:
        """Take in a gateway's update. Return the grant; the same update gets the same one."""
        self._end_silent_leases(now_s)
        gateway = self._gateways.setdefault(gateway_id, _Gateway())
        gateway.heard_s = now_s
        if gateway.last_grant is not None and gateway.last_grant.number == update.number:
            return gateway.last_grant
        # First free what was leased, then count what was sent from it: in one call.
        self._set_left(gateway_id, gateway, update.left, now_s)
        for event in update.events:
            self._apply_event(gateway_id, gateway, event, now_s - max(0.0, event.age_s), now_s)
        granted, wait_s = _NOTHING, 0.0
        for amount in update.waiting:
            wait_s = self.limiter.wait_s(amount, now_s)
            if wait_s > 0.0:
                break
            granted += amount
            self._set_left(gateway_id, gateway, gateway.left + amount, now_s)
        gateway.last_grant = LeaseGrant(
            number=update.number,
            granted=granted,
            wait_s=wait_s,
            state=self.limiter.state(now_s),
        )
        return gateway.last_grant

    def _apply_event(
        self, gateway_id: str, gateway: _Gateway, event: LeaseEvent, at_s: float, now_s: float
    ) -> None:
        """Do in the limiter what the gateway did; `at_s` is when, by our clock."""
        key = f"{gateway_id}/{event.request_id}"
        if event.kind == "sent":
            if event.amount is not None and key not in gateway.reservation_ids:
                gateway.reservation_ids[key] = None
                self.limiter.record_sent(key, event.amount, at_s)
        elif event.kind == "counted":
            # By our own clock and now: a clock that runs ahead must not make it older.
            self.limiter.mark_counted(key, now_s)
        elif event.kind == "ended":
            gateway.reservation_ids.pop(key, None)
            self.limiter.end_reservation(key, event.amount, now_s)
        elif event.kind == "refused":
            gateway.reservation_ids.pop(key, None)
            self.limiter.record_refusal(key, event.report or RateReport(), now_s)
        elif event.report is not None:
            self.limiter.record_report(event.report, now_s)

    def _set_left(self, gateway_id: str, gateway: _Gateway, left: Amount, now_s: float) -> None:
        gateway.left = left
        self.limiter.set_leased(gateway_id, left, now_s)

    def _end_silent_leases(self, now_s: float) -> None:
        """Count as sent what gateways had whose lease has run out."""
        for gateway_id, gateway in list(self._gateways.items()):
            if now_s < gateway.heard_s + LEASE_S:
                continue
            del self._gateways[gateway_id]
            left, lease_id = gateway.left, f"{gateway_id}/lease"
            self.limiter.set_leased(gateway_id, _NOTHING, now_s)
            if left.num_requests:
                self.limiter.record_sent(lease_id, left, now_s)
                gateway.reservation_ids[lease_id] = None
            for key in gateway.reservation_ids:
                self.limiter.mark_counted(key, now_s)
                self.limiter.end_reservation(key, None, now_s)


class LeasedLimiter:
    """A gateway's part of the limits that a `LeaseServer` has.

    `note_waiting` what waits; send `make_update()` when `next_update_s` says so, one at a
    time, and hand the answer to `on_grant`, or call `on_no_answer`.
    """

    def __init__(self, limits: RateLimits) -> None:
        self.limits = limits
        self._left = _NOTHING  # of what was granted
        self._lease_until_s = -math.inf
        self._granted_s = -math.inf
        self._room_at_s = -math.inf  # by the last grant
        self._waiting: dict[str, Amount] = {}
        self._events: list[tuple[float, EventKind, str, Amount | None, RateReport | None]] = []
        self._reservation_ids: set[str] = set()
        self._number = 0
        self._unanswered: tuple[LeaseUpdate, float] | None = None  # and when it was first sent
        self._repeats = False  # send the unanswered update again
        self._last_update_s = -math.inf
        # Nothing used, as far as is known before the first grant.
        self._server_state = RateLimiter(limits).state(0.0)

    def use_limits(self, limits: RateLimits) -> None:
        """Go by these limits from now on; the lease server is told of its own."""
        self.limits = limits

    def wait_s(self, amount: Amount, now_s: float) -> float:
        """Seconds until so much may be sent: 0 is now, inf never."""
        if amount.num_tokens > (self.limits.tpm or math.inf):
            return math.inf
        for most in (self.limits.max_cost_per_hour, self.limits.max_cost_per_day):
            if most is not None and amount.cost > most:
                return math.inf
        if now_s < self._lease_until_s and self._left.covers(amount):
            return 0.0
        return max(_ROUND_TRIP_S, self._room_at_s - now_s)

    def note_waiting(self, request_id: str, amount: Amount) -> None:
        """Ask for so much with the next update, after what waited before."""
        if len(self._waiting) < _MAX_WAITING:
            self._waiting[request_id] = amount

    def reserve(self, request_id: str, amount: Amount, now_s: float) -> None:
        """As `RateLimiter.reserve`."""
        if request_id in self._reservation_ids:
            raise ValueError(f"request {request_id} has a reservation already")
        if now_s >= self._lease_until_s or not self._left.covers(amount):
            raise ValueError(f"no room for request {request_id}")
        self._left -= amount
        self._waiting.pop(request_id, None)
        self._reservation_ids.add(request_id)
        self._add_event("sent", request_id, now_s, amount)

    def mark_counted(self, request_id: str, now_s: float) -> None:
        """As `RateLimiter.mark_counted`."""
        if request_id in self._reservation_ids:
            self._add_event("counted", request_id, now_s)

    def end_reservation(self, request_id: str, counted: Amount | None, now_s: float) -> None:
        """As `RateLimiter.end_reservation`."""
        if request_id in self._reservation_ids:
            self._reservation_ids.discard(request_id)
            self._add_event("ended", request_id, now_s, counted)

    def record_refusal(self, request_id: str, report: RateReport, now_s: float) -> None:
        """As `RateLimiter.record_refusal`; drop the rest of the grant until the server knows."""
        self._left = _NOTHING
        self._room_at_s = max(self._room_at_s, now_s + (report.retry_after_s or 0.0))
        if request_id in self._reservation_ids:
            self._reservation_ids.discard(request_id)
            self._add_event("refused", request_id, now_s, report=report)

    def record_report(self, report: RateReport, now_s: float) -> None:
        """As `RateLimiter.record_report`."""
        self._add_event("report", "", now_s, report=report)

    def next_update_s(self) -> float | None:
        """When to send an update, on the gateway's clock; None: not before something happens."""
        if self._unanswered is not None:
            return self._last_update_s + _RENEW_S if self._repeats else None
        due_s = math.inf
        if self._waiting:
            due_s = self._room_at_s
        if self._events:
            due_s = min(due_s, self._events[0][0] + _GATHER_S)
        if self._reservation_ids or self._left.num_requests:
            due_s = min(due_s, self._last_update_s + _RENEW_S)
        return None if math.isinf(due_s) and due_s > 0 else due_s

    def make_update(self, now_s: float) -> LeaseUpdate:
        """Return what to tell the lease server now; after `on_no_answer`, the same again."""
        self._last_update_s = now_s
        if self._unanswered is not None:
            self._repeats = False
            return self._unanswered[0]
        if now_s >= min(self._lease_until_s, self._granted_s + _UNUSED_S):
            self._left = _NOTHING
        self._number += 1
        update = LeaseUpdate(
            number=self._number,
            events=[
                LeaseEvent(kind, request_id, now_s - at_s, amount, report)
                for at_s, kind, request_id, amount, report in self._events
            ],
            left=self._left,
            waiting=list(self._waiting.values()),
        )
        self._events, self._waiting = [], {}
        self._unanswered = (update, now_s)
        return update

    def on_grant(self, grant: LeaseGrant, now_s: float) -> None:
        """Take in the lease server's answer."""
        if self._unanswered is None or grant.number != self._unanswered[0].number:
            return
        update, sent_s = self._unanswered
        self._unanswered = None
        self._lease_until_s = sent_s + LEASE_S  # the server counts from later
        if update.waiting:
            self._room_at_s = now_s + grant.wait_s
        self._waiting.clear()  # whoever still waits is noted again
        self._server_state = grant.state
        if grant.granted.num_requests:
            self._granted_s = now_s
            if now_s < self._lease_until_s:
                self._left += grant.granted

    def on_no_answer(self) -> None:
        """Say the same again, in a while: the lease server has not answered."""
        self._repeats = True

    def state(self, now_s: float) -> RateLimiterState:
        """Return the lease server's last word on all gateways' use, and what is leased."""
        is_leased = now_s < self._lease_until_s
        leased = self._left.num_requests if is_leased else 0
        return msgspec.structs.replace(self._server_state, leased=leased)

    def _add_event(
        self,
        kind: EventKind,
        request_id: str,
        now_s: float,
        amount: Amount | None = None,
        report: RateReport | None = None,
    ) -> None:
        self._events.append((now_s, kind, request_id, amount, report))
