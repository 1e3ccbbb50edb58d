"""May one engine, or one provider under one key, be called at all?

    state      moved by                                              to
    CLOSED     failures or timeouts in a row, share of failed or     OPEN
               slow calls among the last ones, `trip`
    OPEN       `tick`, once the cooldown is over                     HALF_OPEN
    OPEN       `trip`: what was wrong still is; the cooldown begins  OPEN
               again, no longer than before
    HALF_OPEN  the probe fails, times out or is slow; `trip`         OPEN, longer
    HALF_OPEN  the probe ends without a verdict                      HALF_OPEN
    HALF_OPEN  the probe succeeds                                    CLOSED, slow start

Closed, calls begin freely. Open, none begins. Half-open, exactly one begins: the probe, whose
verdict decides. After a probe the share of calls grows from a tenth to all of them (slow
start); only when it has, the next cooldown is the first again.

What never happens: a second probe before the first has ended; a state moved by the verdict of
a call that began before the breaker last opened. A probe that ends without a verdict (its
client has left, say) has told nothing: the next call is the probe, or nothing would ever close
the breaker. Client errors are no verdict: such calls end by `release_permit`. So does a call that
failed, until it shows whose fault that was; `record_late_failure` counts it then.

The states are Nygard's (*Release It!*, 2007), the windows those of resilience4j. Cooldowns are
stretched at random as AWS advises (Brooker 2015): many gateways must not probe one engine at
the same moment.
"""

import enum
import random
from collections import deque
from typing import Final

import msgspec

from router.resilience.settings import BreakerSettings

# Of full traffic, what slow start begins with: enough to warm up, too little to hurt.
_FIRST_SHARE = 0.1


class BreakerState(enum.Enum):
    """The states of the table above."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


# Looked up once: a member costs 0.1 µs each time (Python 3.11), and these are asked for at every
# event.
_CLOSED: Final = BreakerState.CLOSED
_OPEN: Final = BreakerState.OPEN
_HALF_OPEN: Final = BreakerState.HALF_OPEN


class Failure(enum.Enum):
    """How a call failed through no fault of the client's."""

    ERROR = "error"
    TIMEOUT = "timeout"


class TripReason(enum.Enum):
    """Why a breaker opened."""

    CONSECUTIVE_FAILURES = "consecutive_failures"
    CONSECUTIVE_TIMEOUTS = "consecutive_timeouts"
    FAILURE_SHARE = "failure_share"
    SLOW_SHARE = "slow_share"
    PROBE_FAILED = "probe_failed"
    PROBE_SLOW = "probe_slow"
    LOST = "lost"  # the connection, or the process behind it
    STALE = "stale"  # no sign of life
    HUNG = "hung"  # alive, but its work does not get on


class BreakerEvent(msgspec.Struct, frozen=True):
    """One line of the log that breakers share."""

    at_s: float
    breaker: str
    event: str  # the state it is in from now on, or "probe"
    reason: str = ""


class BreakerView(msgspec.Struct, frozen=True, kw_only=True):
    """One breaker as `/headway/state` shows it; `BreakerState` is the state alone."""

    state: BreakerState
    reason: TripReason | None  # why it opened last; None once it is closed again
    next_probe_in_s: float | None  # None unless it is open
    share: float  # of the traffic that it could get, 0-1
    num_opened: int  # since it was last closed with full traffic
    num_open_calls: int  # begun and not ended


BreakerLog = deque[BreakerEvent]  # bounded by whoever makes it


# Verdicts: indices of the counts of each.
_GOOD: Final = 0
_FAILED: Final = 1
_SLOW: Final = 2


class Breaker:
    """One breaker; time and randomness are passed in.

    Begin each call by `begin_call` and end it once, by `record_success`, `record_failure` or
    `release_permit`. Call `tick` now and then: states that time moves are moved by it alone.
    """

    __slots__ = (
        "_closed_s",
        "_counts",
        "_failures",
        "_first_valid_permit",
        "_last_permit",
        "_log",
        "_name",
        "_num_opened",
        "_probe_permit",
        "_probe_s",
        "_reason",
        "_rng",
        "_settings",
        "_timeouts",
        "_verdicts",
        "_was_slow",
        "share",
        "status",
    )

    def __init__(
        self,
        settings: BreakerSettings,
        rng: random.Random,
        now_s: float,
        *,
        name: str = "",
        log: BreakerLog | None = None,
        slow_start: bool = False,
    ) -> None:
        self.status = BreakerState.CLOSED
        self.share = 1.0  # of the traffic it could get, what it should get while closed
        self._settings = settings
        self._rng = rng
        self._name = name
        self._log = log if log is not None else BreakerLog(maxlen=0)
        self._reason: TripReason | None = None
        self._probe_permit: int | None = None  # None: no probe has begun
        self._probe_s = 0.0  # while open: when the cooldown is over
        self._closed_s = now_s
        self._num_opened = 0  # since it was last closed with full traffic
        self._last_permit = 0
        self._first_valid_permit = 1  # since it last opened
        self._was_slow: dict[int, bool] = {}  # of calls begun and not ended, by permit
        self._verdicts: deque[tuple[float, int]] = deque()  # the window, oldest first
        self._counts = [0, 0, 0]  # in the window, by verdict
        self._failures = self._timeouts = 0  # in a row
        if slow_start and settings.slow_start_s > 0.0:
            self.share = _FIRST_SHARE

    @property
    def reason(self) -> TripReason | None:
        """Why it opened last; None once it is closed again."""
        return self._reason

    @property
    def is_steady(self) -> bool:
        """Whether time alone will change nothing: closed, with full traffic."""
        return self.status is _CLOSED and self.share == 1.0

    def admits(self, max_calls: float = float("inf")) -> bool:
        """Whether a call may begin; `max_calls` is what the other side takes at once.

        In slow start this many times its share may have begun, but always one.
        """
        if self.status is _CLOSED:
            return self.share == 1.0 or len(self._was_slow) < max(1.0, self.share * max_calls)
        return self.status is _HALF_OPEN and self._probe_permit is None

    def begin_call(self, now_s: float) -> int:
        """Begin a call. Return its permit. Raises `ValueError` unless `admits()`."""
        if not self.admits():
            raise ValueError(f"breaker {self._name} is {self.status.value}")
        self._last_permit += 1
        self._was_slow[self._last_permit] = False
        if self.status is _HALF_OPEN:
            self._probe_permit = self._last_permit
            self._write_event(now_s, "probe")
        return self._last_permit

    def record_success(self, permit: int, now_s: float) -> None:
        """End a call that went well; a permit that was ended, or never given, changes nothing."""
        was_slow = self._was_slow.pop(permit, None)
        if was_slow is None or permit < self._first_valid_permit:
            return
        self._failures = self._timeouts = 0
        if permit == self._probe_permit:
            self._close(now_s)
        elif self.status is _CLOSED and not was_slow:
            self._add_verdict(_GOOD, now_s)

    def record_slow(self, permit: int, now_s: float) -> None:
        """Count a call as slow, which goes on; of one call this counts once."""
        if permit < self._first_valid_permit or self._was_slow.get(permit, True):
            return
        self._was_slow[permit] = True
        if permit == self._probe_permit:
            self._open(TripReason.PROBE_SLOW, now_s)
        elif self.status is _CLOSED:
            self._add_verdict(_SLOW, now_s)

    def record_failure(self, permit: int, failure: Failure, now_s: float) -> None:
        """End a call that failed through no fault of the client's; else as `record_success`."""
        if self._was_slow.pop(permit, None) is None or permit < self._first_valid_permit:
            return
        if permit == self._probe_permit:
            self._open(TripReason.PROBE_FAILED, now_s)
        elif self.status is _CLOSED:
            self._count_failure(failure, now_s)

    def record_late_failure(self, permit: int, failure: Failure, now_s: float) -> None:
        """Count a call as failed that ended without a verdict: the fault was not the client's."""
        if permit < self._first_valid_permit or self.status is not _CLOSED:
            return
        self._count_failure(failure, now_s)

    def _count_failure(self, failure: Failure, now_s: float) -> None:
        self._failures += 1
        self._timeouts = self._timeouts + 1 if failure is Failure.TIMEOUT else 0
        self._add_verdict(_FAILED, now_s)

    def release_permit(self, permit: int) -> None:
        """End a call without a verdict: the client left, or was at fault."""
        self._was_slow.pop(permit, None)
        if permit == self._probe_permit:
            self._probe_permit = None

    def trip(self, reason: TripReason, now_s: float) -> None:
        """Open for what no single call told: a lost connection, silence, a hang."""
        if self.status is _OPEN:
            self._reason = reason
            self._probe_s = max(self._probe_s, now_s + self._settings.cooldown_s)
        else:
            self._open(reason, now_s)

    def tick(self, now_s: float) -> None:
        """Do what is due by now: become half-open, or let the share of calls grow."""
        if self.status is _OPEN and now_s >= self._probe_s:
            self.status = BreakerState.HALF_OPEN
            self._write_event(now_s, self.status.value)
        elif self.status is _CLOSED and self.share < 1.0:
            grown = (now_s - self._closed_s) / self._settings.slow_start_s
            self.share = min(1.0, max(self.share, _FIRST_SHARE + (1.0 - _FIRST_SHARE) * grown))
            if self.share == 1.0:
                self._num_opened = 0

    def state(self, now_s: float) -> BreakerView:
        """Return the state, its reason and the seconds until the next probe."""
        is_open = self.status is _OPEN
        return BreakerView(
            state=self.status,
            reason=self._reason,
            next_probe_in_s=max(0.0, self._probe_s - now_s) if is_open else None,
            share=self.share if self.status is _CLOSED else 0.0,
            num_opened=self._num_opened,
            num_open_calls=len(self._was_slow),
        )

    def _add_verdict(self, verdict: int, now_s: float) -> None:
        """Add a verdict to the window; open if one too many was bad."""
        settings, verdicts, counts = self._settings, self._verdicts, self._counts
        verdicts.append((now_s, verdict))
        counts[verdict] += 1
        while len(verdicts) > settings.window_calls or verdicts[0][0] < now_s - settings.window_s:
            counts[verdicts.popleft()[1]] -= 1
        if self._timeouts >= settings.max_consecutive_timeouts:
            self._open(TripReason.CONSECUTIVE_TIMEOUTS, now_s)
        elif self._failures >= settings.max_consecutive_failures:
            self._open(TripReason.CONSECUTIVE_FAILURES, now_s)
        elif len(verdicts) >= settings.min_calls:
            if counts[_FAILED] >= settings.max_failure_share * len(verdicts):
                self._open(TripReason.FAILURE_SHARE, now_s)
            elif counts[_SLOW] >= settings.max_slow_share * len(verdicts):
                self._open(TripReason.SLOW_SHARE, now_s)

    def _open(self, reason: TripReason, now_s: float) -> None:
        settings = self._settings
        # 2**32 first cooldowns are beyond any bound; more would overflow in the end.
        cooldown_s = settings.cooldown_s * 2.0 ** min(self._num_opened, 32)
        stretch = 1.0 + settings.cooldown_jitter * self._rng.random()
        self._probe_s = now_s + min(settings.max_cooldown_s, cooldown_s) * stretch
        self._num_opened += 1
        self._first_valid_permit = self._last_permit + 1
        self._forget_verdicts()
        self.status, self._reason = BreakerState.OPEN, reason
        self._write_event(now_s, self.status.value, reason.value)

    def _close(self, now_s: float) -> None:
        self._forget_verdicts()
        self.status, self._reason = BreakerState.CLOSED, None
        self._closed_s = now_s
        if self._settings.slow_start_s > 0.0:
            self.share = _FIRST_SHARE
        else:
            self.share, self._num_opened = 1.0, 0
        self._write_event(now_s, self.status.value)

    def _forget_verdicts(self) -> None:
        self._probe_permit = None
        self._verdicts.clear()
        self._counts = [0, 0, 0]
        self._failures = self._timeouts = 0

    def _write_event(self, now_s: float, event: str, reason: str = "") -> None:
        self._log.append(BreakerEvent(now_s, self._name, event, reason))
