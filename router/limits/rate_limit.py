r"""What may be sent to a provider under one key now, before it would answer 429?

A reservation's states, and who moves it:

    (none) --reserve--> in flight --mark_counted, or 5 s--> counted --end_reservation--> (none)
                            |  \--record_refusal: 429--> (none), its request counted
                            \--end_reservation: never sent, or answered already--> (none)

A request reserves itself, its prompt, all the output it may have, and its price. It
reserves before it is sent, so that requests in flight at the same time cannot overrun a
limit together. What is counted leaves with its window. What was reserved and not counted
returns when the reply has ended. Limits are those configured, lowered by what the provider
reports and by what it refuses.

What never happens: more in flight and in the window than a limit allows, except for what
a provider counts higher than we did; a reservation that outlives its request.
"""

import math

import msgspec

from router.limits.settings import RateLimits
from router.limits.sliding_window import SlidingWindow, WindowEntry, WindowState

_MINUTE_S, _HOUR_S, _DAY_S = 60.0, 3600.0, 86400.0
# A provider counts a request when it comes, not when it answers. For a reply that takes its
# time we wait this long; the network's usual delays are far shorter.
_COUNTED_WITHIN_S = 5.0
# From this used share of a limit on, requests are spaced; at all of it as sparsely as the
# limit lets them through in the long run. So room returns steadily, and a limit that was
# lowered meets few requests at a time.
_SPACED_FROM_SHARE = 0.5
# A request may go this long before its time: nobody checks more often.
_SPACING_SLACK_S = 0.05
# After a 429 that does not tell the limit, the limit is taken to be this share of what was
# let through: three such steps find any limit down to a third.
_GUESSED_SHARE = 0.7
# If less than this share of a limit is used, that limit is not the one that was reached.
_MIN_USED_SHARE = 0.25
_GUESS_HOLDS_S = 3600.0  # after an hour it may have been a bad hour
_FIRST_PAUSE_S, _MAX_PAUSE_S = 1.0, 60.0  # after a 429 that does not say how long
_CALL_MEMORY = 20.0  # calls over which the usual duration is learned


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


class RateLimiterState(msgspec.Struct, frozen=True, kw_only=True):
    """What is used of a key's limits."""

    num_open: int  # reservations that have not ended
    num_refused: int  # 429s
    paused_s: float  # for so long nothing is sent
    requests: WindowState
    tokens: WindowState
    cost_hour: WindowState
    cost_day: WindowState
    # Requests that this gateway may still send, where several share the limits; else absent.
    leased: int | msgspec.UnsetType = msgspec.UNSET


class _Reservation:
    __slots__ = ("amount", "entries", "sent_s")

    def __init__(self, amount: Amount, sent_s: float) -> None:
        self.amount = amount
        self.sent_s = sent_s
        self.entries: list[WindowEntry] = []  # one of each window; none until it is counted


class RateLimiter:
    """One key's limits, what is reserved under them, and when room returns."""

    def __init__(self, limits: RateLimits) -> None:
        self.limits = limits
        self._requests = SlidingWindow(limits.rpm or math.inf, _MINUTE_S)
        self._tokens = SlidingWindow(limits.tpm or math.inf, _MINUTE_S)
        self._windows = (
            self._requests,
            self._tokens,
            SlidingWindow(limits.max_cost_per_hour or math.inf, _HOUR_S),
            SlidingWindow(limits.max_cost_per_day or math.inf, _DAY_S),
        )
        self._reservations: dict[str, _Reservation] = {}
        self._in_flight: dict[str, _Reservation] = {}  # of these, in the order they were sent
        self._leased: dict[str, Amount] = {}  # by holder (`router.limits.lease`)
        self._num_leased_requests = 0
        self._next_send_s = -math.inf  # spacing: when the next request may go
        self._paused_until_s = -math.inf
        self._pause_s = _FIRST_PAUSE_S
        self._guess_until_s = math.inf
        self._call_s = 1.0  # usual duration of a call; a guess until one has ended
        self.num_refused = 0  # 429s

    def use_limits(self, limits: RateLimits) -> None:
        """Go by these limits from now on; what is reserved or counted stays."""
        self.limits = limits
        self._requests.limit = limits.rpm or math.inf
        self._tokens.limit = limits.tpm or math.inf
        self._windows[2].limit = limits.max_cost_per_hour or math.inf
        self._windows[3].limit = limits.max_cost_per_day or math.inf
        self._guess_until_s = math.inf

    def wait_s(self, amount: Amount, now_s: float) -> float:
        """Seconds until so much may be sent: 0 is now, inf never."""
        self._advance(now_s)
        wait_s = max(
            self._paused_until_s - now_s, self._next_send_s - _SPACING_SLACK_S - now_s, 0.0
        )
        for window, value in zip(self._windows, _by_window(amount), strict=True):
            wait_s = max(wait_s, window.wait_s(value, now_s))
        if (most := self.limits.max_concurrency) is not None:
            num_open = len(self._reservations) + self._num_leased_requests
            if amount.num_requests > most:
                return math.inf
            if amount.num_requests + num_open > most:
                wait_s = max(wait_s, self._call_s / num_open)  # by then one should have ended
        return wait_s

    def note_waiting(self, request_id: str, amount: Amount) -> None:
        """Do nothing: whoever asks again in time gets it. A leased limiter has to be told."""

    def reserve(self, request_id: str, amount: Amount, now_s: float) -> None:
        """Reserve an amount for a request that is sent now.

        Raises `ValueError` if it has a reservation already, or there is no room.
        """
        if self.wait_s(amount, now_s) > 0.0:
            raise ValueError(f"no room for request {request_id}")
        self.record_sent(request_id, amount, now_s)
        self._set_next_send(amount, now_s)

    def record_sent(self, request_id: str, amount: Amount, sent_s: float) -> None:
        """Reserve for a request that was sent at this time, whether or not there is room.

        Raises `ValueError` if it has a reservation already.
        """
        if request_id in self._reservations:
            raise ValueError(f"request {request_id} has a reservation already")
        reservation = _Reservation(amount, sent_s)
        self._reservations[request_id] = self._in_flight[request_id] = reservation
        for window, value in zip(self._windows, _by_window(amount), strict=True):
            window.add_in_flight(value)

    def mark_counted(self, request_id: str, now_s: float) -> None:
        """Count a request as of now: the provider's answer proves that it has."""
        reservation = self._in_flight.pop(request_id, None)
        if reservation is not None:
            self._pause_s = _FIRST_PAUSE_S
            self._count_in_flight(reservation, now_s)

    def end_reservation(self, request_id: str, counted: Amount | None, now_s: float) -> None:
        """End a request's reservation; an unknown id changes nothing.

        `counted` is what the provider counts for it now, None if nobody knows: then all
        that was reserved, or nothing if the provider never answered.
        """
        self._advance(now_s)
        reservation = self._reservations.pop(request_id, None)
        if reservation is None:
            return
        self._call_s += (now_s - reservation.sent_s - self._call_s) / _CALL_MEMORY
        if self._in_flight.pop(request_id, None) is not None:
            if counted is None:
                self._cancel_in_flight(reservation.amount)
                return
            self._count_in_flight(reservation, now_s)
        if counted is not None:
            more = _by_window(counted - reservation.amount)
            for window, entry, value in zip(self._windows, reservation.entries, more, strict=True):
                window.adjust_entry(entry, value, now_s)

    def record_refusal(self, request_id: str, report: RateReport, now_s: float) -> None:
        """End the reservation of a request that was answered 429; pause, learn the limit.

        The request itself counts (OpenAI: "unsuccessful requests contribute"), its tokens
        do not.
        """
        self._advance(now_s)
        self.num_refused += 1
        reservation = self._reservations.pop(request_id, None)
        if reservation is not None:
            if self._in_flight.pop(request_id, None) is not None:
                self._cancel_in_flight(reservation.amount)
            if report.limit_requests is None and report.limit_tokens is None:
                self._lower_nearest_limit(now_s)
            self._requests.add_counted(reservation.amount.num_requests, now_s)
        self.record_report(report, now_s)
        pause_s = report.retry_after_s if report.retry_after_s is not None else self._pause_s
        self._pause_s = min(_MAX_PAUSE_S, 2.0 * self._pause_s)
        self._paused_until_s = max(self._paused_until_s, now_s + pause_s)

    def record_report(self, report: RateReport, now_s: float) -> None:
        """Take in what the headers of a reply said."""
        self._advance(now_s)
        if report.limit_requests is not None and report.remaining_requests is not None:
            self._requests.record_report(report.limit_requests, report.remaining_requests, now_s)
        if report.limit_tokens is not None and report.remaining_tokens is not None:
            self._tokens.record_report(report.limit_tokens, report.remaining_tokens, now_s)

    def set_leased(self, holder: str, amount: Amount, now_s: float) -> None:
        """Keep this amount, in all, for a holder that reserves out of it by itself."""
        more = amount - self._leased.get(holder, Amount())
        self._leased[holder] = amount
        self._num_leased_requests += more.num_requests
        for window, value in zip(self._windows, _by_window(more), strict=True):
            window.add_in_flight(value)
        if more.num_requests > 0:
            self._set_next_send(more, now_s)
        if not amount.num_requests:
            del self._leased[holder]
            self._clear_rounding()

    def pause_until(self, until_s: float) -> None:
        """Send nothing before this time."""
        self._paused_until_s = max(self._paused_until_s, until_s)

    def state(self, now_s: float) -> RateLimiterState:
        """Return what is used of each limit now."""
        self._advance(now_s)
        requests, tokens, cost_hour, cost_day = self._windows
        return RateLimiterState(
            num_open=len(self._reservations),
            num_refused=self.num_refused,
            paused_s=max(0.0, self._paused_until_s - now_s),
            requests=requests.state(),
            tokens=tokens.state(),
            cost_hour=cost_hour.state(),
            cost_day=cost_day.state(),
        )

    def _advance(self, now_s: float) -> None:
        """Do what is due by now: count requests sent long ago, drop what left its window."""
        while self._in_flight:
            request_id, reservation = next(iter(self._in_flight.items()))
            counted_s = reservation.sent_s + _COUNTED_WITHIN_S
            if counted_s > now_s:
                break
            del self._in_flight[request_id]
            self._count_in_flight(reservation, counted_s)
        for window in self._windows:
            window.advance(now_s)
        if now_s >= self._guess_until_s:
            self.use_limits(self.limits)

    def _count_in_flight(self, reservation: _Reservation, now_s: float) -> None:
        reservation.entries = [
            window.count_in_flight(value, now_s)
            for window, value in zip(self._windows, _by_window(reservation.amount), strict=True)
        ]
        self._clear_rounding()

    def _cancel_in_flight(self, amount: Amount) -> None:
        for window, value in zip(self._windows, _by_window(amount), strict=True):
            window.cancel_in_flight(value)
        self._clear_rounding()

    def _clear_rounding(self) -> None:
        """Leave no rest of rounding once nothing is in flight."""
        if not (self._in_flight or self._leased):
            for window in self._windows:
                window.clear_in_flight()

    def _set_next_send(self, amount: Amount, now_s: float) -> None:
        """Space the next request from one that takes this amount now."""
        gap_s = 0.0
        for window, value in zip(self._windows[:2], _by_window(amount)[:2], strict=True):
            crowding = (window.used_share - _SPACED_FROM_SHARE) / (1.0 - _SPACED_FROM_SHARE)
            if crowding > 0.0:
                limit = window.effective_limit
                gap_s = max(gap_s, min(1.0, crowding) * window.window_s * value / limit)
        if gap_s:
            self._next_send_s = max(now_s, self._next_send_s) + gap_s

    def _lower_nearest_limit(self, now_s: float) -> None:
        """Lower the limit that is used most: a refusal did not say which, nor to what."""
        window = max(self._requests, self._tokens, key=lambda window: window.used_share)
        if window.used_share >= _MIN_USED_SHARE:
            window.limit = max(1.0, _GUESSED_SHARE * min(window.limit, window.used))
            self._guess_until_s = now_s + _GUESS_HOLDS_S


def _by_window(amount: Amount) -> tuple[float, float, float, float]:
    """What the amount takes of each of `RateLimiter`'s windows."""
    return (amount.num_requests, amount.num_tokens, amount.cost, amount.cost)
