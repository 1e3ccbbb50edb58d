"""How many engines should there be? Enough, when they are ready, for what will have come by then.

    demand in tokens --forecast, as far ahead as a start takes--> expected load
    expected load + what exceeded forecasts of late             --> engines, by measured rates
    held work that the engines there are will not get done      --> more of them

Up at once, for an engine that is asked for late is late by as much. Down when none was needed for
as long as one takes to start: whoever lets it go sooner pays more for the starts than for the
engine, at worst twice what a clairvoyant pays (ski rental; Karlin et al. 1988).
"""

import math
from collections import deque

import msgspec

from router.scaling.bursts import Bursts
from router.scaling.capacity import engines_for, load_of
from router.scaling.demand import Demand, EngineRates
from router.scaling.forecast import NAMES, Forecast
from router.scaling.settings import ScalingSettings
from router.scaling.start_time import StartTimes

BIN_S = 5.0  # shorter would count single requests
_WINDOW_BINS = 2  # a promise of a first token outlasts no longer excess of work than this
_MEMORY_WINDOWS = 720  # of excesses: an hour of windows that overlap by half
_JUMP_BINS = 2  # in a row beyond all usual excess: it is not a burst
_JUMP_SHARE = 0.99  # of the work is usually below that
_JUMP = 1.5  # times that
_CATCH_UP_S = 120.0  # in which what is late shall be done, once engines are there
_MAX_LATE_S = 30.0  # later requests are refused: `RouterSettings.max_late_s`
_MIN_KEEP_S = 60.0
_SILENCE_S = 60.0  # without a request: what came before has ended, whatever its mean says
_SLACK = 0.05  # of an engine: so much is not worth another one
_WARM_STEPS = 16  # rates learned from fewer are a guess


class ScalingState(msgspec.Struct, frozen=True, kw_only=True):
    """How many engines there should be, and why."""

    num_wanted: int = 0
    num_needed: float = 0.0  # by forecast and excess, before bounds and rounding
    expected_load: float = 0.0  # in engines, when one that is asked for now is ready
    recent_load: float = 0.0
    room_load: float = 0.0  # for which there is to be room: with what may exceed it
    backlog_s: float = 0.0  # of held work, seconds of one engine
    start_s: float = 0.0  # that an engine takes to start
    forecast: str = NAMES[0]  # the one that is followed
    prefill_tokens_per_s: float = 0.0  # expected
    decode_tokens_per_s: float = 0.0


class Autoscaler:
    """Follows the demand of one model; `decide` says how many engines it needs."""

    __slots__ = (
        "_bin_start_s",
        "_bursts",
        "_context_tokens",
        "_decode",
        "_expected",
        "_last",
        "_last_arrival_s",
        "_last_request_s",
        "_num_ready",
        "_prefill",
        "_rates",
        "_recent",
        "_wanted",
        "settings",
        "start_times",
        "state",
    )

    def __init__(self, settings: ScalingSettings) -> None:
        self.settings = settings
        self.start_times = StartTimes(settings.start_s)
        self.state = ScalingState()
        self._prefill = Forecast(BIN_S, settings.season_s)
        self._decode = Forecast(BIN_S, settings.season_s)
        self._bursts = Bursts(_MEMORY_WINDOWS, _WINDOW_BINS + _JUMP_BINS)
        self._rates: EngineRates | None = None
        self._context_tokens = 0.0
        self._last: Demand | None = None  # at the start of the bin
        self._bin_start_s = 0.0
        self._last_arrival_s = -math.inf
        self._last_request_s = -math.inf  # that has come, or was open
        self._num_ready = 0
        # Rates of the last bins, and those that were expected: due at which bin, and what.
        self._recent: deque[tuple[float, float]] = deque(maxlen=max(_WINDOW_BINS, _JUMP_BINS))
        self._expected: deque[tuple[int, float, float]] = deque()
        self._wanted: deque[tuple[float, int]] = deque()  # when, and how many were needed

    def decide(
        self, demand: Demand, *, num_ready: int, num_starting: int, now_s: float
    ) -> ScalingState:
        """Return how many engines there should be, starting ones included, and why.

        Call it every second or so. `demand` is what all gateways have seen.
        """
        num_arrived = max(0, num_ready - self._num_ready)
        self.start_times.follow(num_starting, num_arrived, now_s)
        self._num_ready = num_ready
        if demand.rates is not None:
            self._rates = demand.rates
        if self._last is None:
            # Somebody has chosen how many there are at first; that nothing is known yet is no
            # reason for fewer.
            self._wanted.append((now_s, num_ready + num_starting))
            self._last_arrival_s = self._last_request_s = now_s
        self._follow(demand, now_s)
        num_wanted, state = self._wanted_now(demand, num_ready, num_starting, now_s)
        self.state = msgspec.structs.replace(state, num_wanted=num_wanted)
        return self.state

    # Demand

    def _follow(self, demand: Demand, now_s: float) -> None:
        """Take in what has come since the last bin ended, if this one is over."""
        last = self._last
        if last is None or demand.num_requests_total < last.num_requests_total:
            self._last, self._bin_start_s = demand, now_s  # a gateway was replaced
            return
        if demand.num_requests_total > last.num_requests_total:
            self._last_arrival_s = self._last_request_s = now_s
        elif demand.num_open_requests:
            self._last_request_s = now_s
        bin_s = now_s - self._bin_start_s
        if bin_s < BIN_S * 0.99:
            return
        num_requests = demand.num_requests_total - last.num_requests_total
        num_prefill = demand.num_prefill_tokens_total - last.num_prefill_tokens_total
        num_decode = demand.num_decode_tokens_total - last.num_decode_tokens_total
        if num_requests > 0:
            context = (num_prefill + num_decode / 2.0) / num_requests
            share = 0.05 if self._context_tokens else 1.0
            self._context_tokens += share * (context - self._context_tokens)
        self._last, self._bin_start_s = demand, now_s
        self._observe(num_prefill / bin_s, num_decode / bin_s)
        if now_s - self._last_arrival_s >= min(_SILENCE_S, self.settings.zero_after_s):
            self._prefill.jump_to(0.0)
            self._decode.jump_to(0.0)

    def _observe(self, prefill: float, decode: float) -> None:
        horizon_s = self._horizon_s
        self._recent.append((prefill, decode))
        self._prefill.observe(prefill, horizon_s)
        self._decode.observe(decode, horizon_s)
        number = self._prefill.num_observed
        expected: tuple[int, float, float] | None = None
        while self._expected and self._expected[0][0] <= number:
            expected = self._expected.popleft()
        if expected is not None and self._rates is not None:
            came = self._recent_load(self._rates, _WINDOW_BINS)
            self._bursts.record(came, load_of(self._rates, expected[1], expected[2]))
            self._look_for_jump(self._rates, load_of(self._rates, expected[1], expected[2]))
        due = number + max(1, math.ceil(horizon_s / BIN_S))
        self._expected.append((due, self._prefill.ahead(horizon_s), self._decode.ahead(horizon_s)))

    def _look_for_jump(self, rates: EngineRates, expected_load: float) -> None:
        """See whether so much more has come for so long that it is a new level, and no burst."""
        recent = list(self._recent)[-_JUMP_BINS:]
        if len(recent) < _JUMP_BINS:
            return
        limit = _JUMP * self._bursts.room(expected_load, _JUMP_SHARE)
        for prefill, decode in recent:
            if load_of(rates, prefill, decode) <= limit:
                return
        prefill, decode = recent[-1]
        self._prefill.jump_to(prefill)
        self._decode.jump_to(decode)
        self._bursts.forget_pending()
        self._expected = deque([(due, prefill, decode) for due, _, _ in self._expected])

    def _recent_load(self, rates: EngineRates, num_bins: int) -> float:
        recent = list(self._recent)[-num_bins:]
        if not recent:
            return 0.0
        return sum([load_of(rates, prefill, decode) for prefill, decode in recent]) / len(recent)

    @property
    def _horizon_s(self) -> float:
        """How far ahead a decision reaches: until an engine that is asked for now is ready."""
        return self.start_times.usual_s + BIN_S

    @property
    def _keep_s(self) -> float:
        keep_s = self.settings.keep_s
        return keep_s if keep_s is not None else max(_MIN_KEEP_S, self.start_times.usual_s)

    # Engines

    def _wanted_now(
        self, demand: Demand, num_ready: int, num_starting: int, now_s: float
    ) -> tuple[int, ScalingState]:
        rates, settings = self._rates, self.settings
        if rates is None:
            return self._bounded(1 if demand.num_open_requests else num_ready, now_s), self.state
        horizon_s = self._horizon_s
        # What comes until an engine is ready is for those that are there, but if one of these is
        # let go, it is not there either.
        prefill = max(self._prefill.ahead(horizon_s), self._prefill.ahead(0.0))
        decode = max(self._decode.ahead(horizon_s), self._decode.ahead(0.0))
        load = load_of(rates, prefill, decode)
        room = self._bursts.room(load, settings.goodput)
        most_decode = decode * room / load if load > 0.0 else decode
        needed = engines_for(rates, room, most_decode, self._context_tokens, settings.max_load)
        backlog_s, left_s = self._backlog(demand, rates, num_ready, num_starting)
        # What is late is done by what is not needed for the rest, within a while.
        needed = max(needed, load + left_s / _CATCH_UP_S)
        wanted = max(0, math.ceil(needed - _SLACK))
        if rates.num_steps < _WARM_STEPS:  # by a guess that may be ten times too slow
            wanted = min(wanted, max(num_ready + num_starting, 1) + (backlog_s > 0.0))
        state = ScalingState(
            num_needed=needed,
            expected_load=load,
            recent_load=self._recent_load(rates, _WINDOW_BINS),
            room_load=room,
            backlog_s=backlog_s,
            start_s=self.start_times.usual_s,
            forecast=NAMES[self._prefill.best],
            prefill_tokens_per_s=prefill,
            decode_tokens_per_s=decode,
        )
        return self._bounded(wanted, now_s), state

    def _backlog(
        self, demand: Demand, rates: EngineRates, num_ready: int, num_starting: int
    ) -> tuple[float, float]:
        """Return the held work, seconds of an engine, and what will be left of it.

        When an engine that is asked for now is ready, by those that there are.
        """
        mean_output = 0.0
        if demand.num_requests_total:
            mean_output = demand.num_decode_tokens_total / demand.num_requests_total
        backlog_s = demand.num_held_tokens * rates.token_s
        backlog_s += demand.num_held_requests * mean_output * rates.decode_s
        if not backlog_s:
            return 0.0, 0.0
        load = self._recent_load(rates, _WINDOW_BINS)
        # Those that are starting are there for half of that time, on average.
        spare = num_ready + num_starting / 2.0 - load
        left_s = backlog_s - spare * self.start_times.usual_s
        return backlog_s, max(0.0, min(left_s, max(backlog_s, num_ready * _MAX_LATE_S)))

    def _bounded(self, wanted: int, now_s: float) -> int:
        """Return the most that was wanted for as long as engines are kept, within the bounds."""
        settings = self.settings
        self._wanted.append((now_s, wanted))
        while self._wanted and self._wanted[0][0] < now_s - self._keep_s:
            self._wanted.popleft()
        most = max([number for _, number in self._wanted])
        is_in_use = now_s - self._last_request_s < settings.zero_after_s
        least = max(settings.min, 1 if is_in_use else 0)
        if not is_in_use and wanted <= 1 and self.state.expected_load < _SLACK:
            most = 0  # what is expected is the forecast's memory of what has ended
        return min(max(most, least), settings.max)


def emptiest(left_tokens: dict[str, int], num_engines: int) -> list[str]:
    """Return the ids of so many engines that hold the least, tokens to be computed.

    To be let go: they are empty first. Of equals, those that have the last ids.
    """
    ids = sorted(left_tokens, key=lambda engine: engine, reverse=True)
    ids.sort(key=lambda engine: left_tokens[engine])
    return ids[:num_engines]
