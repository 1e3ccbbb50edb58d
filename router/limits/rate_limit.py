r"""What may still be sent to a provider under one key, before it would answer 429.

A reservation's states, and who moves it:

    (none) --reserve--> on its way --count, or 5 s--> counted --settle--> (none)
                            |  \--refuse: 429--> (none), its request counted
                            \--settle: never sent, or answered already--> (none)

Reserved are one request, its prompt and all the output it may have, and its
price: before it is sent, so that requests that are under way at the same time
cannot overrun a limit together. What is counted leaves with its window; what
was reserved and not counted returns when the reply has ended. Limits are those
configured, lowered by what the provider reports and by what it refuses.

What never happens: more on its way and in the window than a limit allows, but
for what a provider counts higher than we did; a reservation that outlives
its request.
"""

import math

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from router.limits.sliding_window import Grain, Window

_MINUTE_S, _HOUR_S, _DAY_S = 60.0, 3600.0, 86400.0
# A provider counts a request when it comes, not when it answers. A reply that takes
# its time is waited for so long; with the usual delays of the network that is a lot.
_COUNTED_WITHIN_S = 5.0
# From this share of a limit on, requests are spaced; at all of it as sparsely as the
# limit lets them through in the long run. So what is used returns as steadily, and a
# limit that was lowered meets few requests at a time.
_PACED_SHARE = 0.5
# A request may come so much before its turn: more often than this nobody looks.
_PACE_SLACK_S = 0.05
# After a 429 that does not tell the limit, so much of what was let through is taken for
# it: three such steps find any limit down to a third. Below a quarter of a limit it is not
# ours that was reached; and after an hour it may have been a bad hour.
_BELIEF_SHARE = 0.7
_LEAST_BELIEVABLE = 0.25
_BELIEF_S = 3600.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0  # after a 429 that does not say how long
_CALL_MEMORY = 20.0  # calls over which the usual duration is learned


class RateLimits(BaseModel):
    """What the provider allows under one key; unset: as it reports, or no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rpm: int | None = Field(None, ge=1, description="requests in any minute")
    tpm: int | None = Field(None, ge=1, description="tokens in any minute, prompt and output")
    max_concurrency: int | None = Field(None, ge=1, description="requests open at a time")
    max_cost_per_hour: float | None = Field(
        None, gt=0, description="cost in any hour, in the currency of the prices"
    )
    max_cost_per_day: float | None = Field(None, gt=0, description="the same in any 24 hours")
    returns_unused_tokens: bool = Field(
        False,
        description="the provider counts the output that came, not max_tokens, "
        "once a reply has ended (Anthropic; OpenAI does not)",
    )


class Amount(msgspec.Struct, frozen=True, gc=False):
    """What a request takes, or several together."""

    num_requests: int = 0
    num_tokens: int = 0
    cost: float = 0.0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(
            self.num_requests + other.num_requests,
            self.num_tokens + other.num_tokens,
            self.cost + other.cost,
        )

    def __sub__(self, other: "Amount") -> "Amount":
        return Amount(
            self.num_requests - other.num_requests,
            self.num_tokens - other.num_tokens,
            self.cost - other.cost,
        )

    def covers(self, other: "Amount") -> bool:
        """Whether all of `other` is contained."""
        return (
            self.num_requests >= other.num_requests
            and self.num_tokens >= other.num_tokens
            and self.cost >= other.cost - 1e-9  # rounding of sums
        )


class RateReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the headers of a provider's reply say of its limits; None: nothing."""

    limit_requests: int | None = None  # in a minute
    remaining_requests: int | None = None
    limit_tokens: int | None = None
    remaining_tokens: int | None = None
    retry_after_s: float | None = None


class _Reservation:
    __slots__ = ("amount", "grains", "sent_s")

    def __init__(self, amount: Amount, now_s: float) -> None:
        self.amount = amount
        self.sent_s = now_s
        self.grains: list[Grain] = []  # as the windows; none until it is counted


class RateLimiter:
    """One key's limits, what is reserved under them, and when room returns."""

    def __init__(self, limits: RateLimits) -> None:
        self.limits = limits
        self._requests = Window(limits.rpm or math.inf, _MINUTE_S)
        self._tokens = Window(limits.tpm or math.inf, _MINUTE_S)
        self._windows = (
            self._requests,
            self._tokens,
            Window(limits.max_cost_per_hour or math.inf, _HOUR_S),
            Window(limits.max_cost_per_day or math.inf, _DAY_S),
        )
        self._open: dict[str, _Reservation] = {}
        self._on_way: dict[str, _Reservation] = {}  # of these, in the order they were sent
        self._aside: dict[str, Amount] = {}
        self._num_aside = 0  # requests
        self._next_s = -math.inf  # pace: when the next request's turn is
        self._paused_until_s = -math.inf
        self._pause_s = _FIRST_PAUSE_S
        self._belief_until_s = math.inf
        self._call_s = 1.0  # usual duration of a call; a guess until one has ended
        self.num_refused = 0  # 429s

    @property
    def num_open(self) -> int:
        """Reservations that have not ended."""
        return len(self._open)

    def use(self, limits: RateLimits) -> None:
        """Go by these limits from now on; what is reserved or counted stays."""
        self.limits = limits
        self._requests.limit = limits.rpm or math.inf
        self._tokens.limit = limits.tpm or math.inf
        self._windows[2].limit = limits.max_cost_per_hour or math.inf
        self._windows[3].limit = limits.max_cost_per_day or math.inf
        self._belief_until_s = math.inf

    def room_s(self, amount: Amount, now_s: float) -> float:
        """When so much may be sent, seconds from now: 0 is now, inf never."""
        self._advance(now_s)
        wait_s = max(self._paused_until_s - now_s, self._next_s - _PACE_SLACK_S - now_s, 0.0)
        for window, value in zip(self._windows, _values(amount), strict=True):
            wait_s = max(wait_s, window.room_s(value, now_s))
        if (most := self.limits.max_concurrency) is not None:
            num_open = len(self._open) + self._num_aside
            if amount.num_requests > most:
                return math.inf
            if amount.num_requests + num_open > most:
                wait_s = max(wait_s, self._call_s / num_open)  # by then one should have ended
        return wait_s

    def want(self, request_id: str, amount: Amount) -> None:
        """Nothing: whoever asks again in time gets it. A leased budget has to be told."""

    def reserve(self, request_id: str, amount: Amount, now_s: float) -> None:
        """Take room for a request that is sent now.

        Raises `ValueError` if it has a reservation already, or there is no room.
        """
        if self.room_s(amount, now_s) > 0.0:
            raise ValueError(f"no room for request {request_id}")
        self.book(request_id, amount, now_s)
        self._pace(amount, now_s)

    def book(self, request_id: str, amount: Amount, now_s: float) -> None:
        """Count a request that was sent at this time, whether or not there is room."""
        if request_id in self._open:
            raise ValueError(f"request {request_id} has a reservation already")
        self._open[request_id] = self._on_way[request_id] = _Reservation(amount, now_s)
        for window, value in zip(self._windows, _values(amount), strict=True):
            window.send(value)

    def count(self, request_id: str, now_s: float) -> None:
        """The provider has answered: it has counted the request by now."""
        reservation = self._on_way.pop(request_id, None)
        if reservation is not None:
            self._pause_s = _FIRST_PAUSE_S
            self._count(reservation, now_s)

    def settle(self, request_id: str, counted: Amount | None, now_s: float) -> None:
        """End a request's reservation; an unknown id changes nothing.

        `counted` is what the provider counts for it now, None if nobody knows:
        then all that was reserved, or nothing if the provider never answered.
        """
        self._advance(now_s)
        reservation = self._open.pop(request_id, None)
        if reservation is None:
            return
        self._call_s += (now_s - reservation.sent_s - self._call_s) / _CALL_MEMORY
        if self._on_way.pop(request_id, None) is not None:
            if counted is None:
                self._take_back(reservation.amount)
                return
            self._count(reservation, now_s)
        if counted is not None:
            more = _values(counted - reservation.amount)
            for window, grain, value in zip(self._windows, reservation.grains, more, strict=True):
                window.adjust(grain, value, now_s)

    def refuse(self, request_id: str, report: RateReport, now_s: float) -> None:
        """The provider has answered 429: end the reservation, pause, learn the limit.

        The request itself counts (OpenAI: "unsuccessful requests contribute"),
        its tokens do not.
        """
        self._advance(now_s)
        self.num_refused += 1
        reservation = self._open.pop(request_id, None)
        if reservation is not None:
            if self._on_way.pop(request_id, None) is not None:
                self._take_back(reservation.amount)
            if report.limit_requests is None and report.limit_tokens is None:
                self._believe(now_s)
            self._requests.add(reservation.amount.num_requests, now_s)
        self.report(report, now_s)
        pause_s = report.retry_after_s if report.retry_after_s is not None else self._pause_s
        self._pause_s = min(_LONGEST_PAUSE_S, 2.0 * self._pause_s)
        self._paused_until_s = max(self._paused_until_s, now_s + pause_s)

    def report(self, report: RateReport, now_s: float) -> None:
        """Take in what the headers of a reply said."""
        self._advance(now_s)
        if report.limit_requests is not None and report.remaining_requests is not None:
            self._requests.report(report.limit_requests, report.remaining_requests, now_s)
        if report.limit_tokens is not None and report.remaining_tokens is not None:
            self._tokens.report(report.limit_tokens, report.remaining_tokens, now_s)

    def set_aside(self, holder: str, amount: Amount, now_s: float) -> None:
        """Keep so much, in all, for a holder that reserves by itself (`router.limits.lease`)."""
        more = amount - self._aside.get(holder, Amount())
        self._aside[holder] = amount
        self._num_aside += more.num_requests
        for window, value in zip(self._windows, _values(more), strict=True):
            window.send(value)
        if more.num_requests > 0:
            self._pace(more, now_s)
        if not amount.num_requests:
            del self._aside[holder]
            self._nothing_on_way()

    def block(self, until_s: float) -> None:
        """Send nothing before then."""
        self._paused_until_s = max(self._paused_until_s, until_s)

    def state(self, now_s: float) -> dict[str, object]:
        """What is used of each limit now, for people to read; JSON-able."""
        self._advance(now_s)
        names = ("requests", "tokens", "cost_hour", "cost_day")
        return {
            "num_open": len(self._open),
            "num_refused": self.num_refused,
            "paused_s": max(0.0, self._paused_until_s - now_s),
            **{
                name: {
                    "used": window.ours,
                    "limit": None if math.isinf(window.most) else window.most,
                    "share": window.share,
                }
                for name, window in zip(names, self._windows, strict=True)
            },
        }

    def _advance(self, now_s: float) -> None:
        """Move what time moves."""
        while self._on_way:
            request_id, reservation = next(iter(self._on_way.items()))
            counted_s = reservation.sent_s + _COUNTED_WITHIN_S
            if counted_s > now_s:
                break
            del self._on_way[request_id]
            self._count(reservation, counted_s)
        for window in self._windows:
            window.advance(now_s)
        if now_s >= self._belief_until_s:
            self.use(self.limits)

    def _count(self, reservation: _Reservation, now_s: float) -> None:
        reservation.grains = [
            window.count(value, now_s)
            for window, value in zip(self._windows, _values(reservation.amount), strict=True)
        ]
        self._nothing_on_way()

    def _take_back(self, amount: Amount) -> None:
        for window, value in zip(self._windows, _values(amount), strict=True):
            window.take_back(value)
        self._nothing_on_way()

    def _nothing_on_way(self) -> None:
        if not (self._on_way or self._aside):
            for window in self._windows:
                window.nothing_on_way()

    def _pace(self, amount: Amount, now_s: float) -> None:
        """Set when the next request's turn is."""
        gap_s = 0.0
        for window, value in zip(self._windows[:2], _values(amount)[:2], strict=True):
            crowding = (window.share - _PACED_SHARE) / (1.0 - _PACED_SHARE)
            if crowding > 0.0:
                gap_s = max(gap_s, min(1.0, crowding) * window.window_s * value / window.most)
        if gap_s:
            self._next_s = max(now_s, self._next_s) + gap_s

    def _believe(self, now_s: float) -> None:
        """Lower the limit that is nearest: a refusal did not say which, nor to what."""
        window = max(self._requests, self._tokens, key=lambda window: window.share)
        if window.share >= _LEAST_BELIEVABLE:
            window.limit = max(1.0, _BELIEF_SHARE * min(window.limit, window.ours))
            self._belief_until_s = now_s + _BELIEF_S


def _values(amount: Amount) -> tuple[float, float, float, float]:
    """What the amount takes of each window."""
    return (amount.num_requests, amount.num_tokens, amount.cost, amount.cost)
