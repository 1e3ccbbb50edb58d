"""What will a rate be when an engine that is asked for now is ready?

Several simple forecasts are made side by side, each as the textbooks have it (Hyndman and
Athanasopoulos, *Forecasting*, 3rd ed., chapters 5 and 8): the level over a short and over a long
time, the level with a damped trend, and the level times what the season did a period ago. Each is
compared with what came, at the very horizon that counts here, and the one whose recent errors are
smallest is followed (Herbster and Warmuth 1998: the best expert of late). So no season is believed
in before it has been seen to help, and bursts without order are answered by their mean.

Rates come in bins of equal length; there is no clock here.
"""

import math
from collections import deque

_SHORT_S, _LONG_S = 60.0, 600.0  # of the levels' memories
_TREND_S = 240.0  # of the trend's
_DAMPING = 0.9  # of the trend, per minute ahead
_ERROR_S = 1800.0  # of the errors' memory
_SEASON_BINS = 288  # of a period: five minutes of a day
_SEASON_WEIGHT = 0.5  # of the last period, against all before it
_MIN_SHARE = 1e-9

SHORT, LONG, TREND, SEASON = range(4)
NAMES = ("short level", "long level", "trend", "season")


class Forecast:
    """Forecasts of one rate, per second; `bin_s` seconds each observation."""

    __slots__ = (
        "_bin_s",
        "_errors",
        "_long",
        "_made",
        "_num",
        "_recent",
        "_season",
        "_season_num",
        "_season_s",
        "_short",
        "_slope",
    )

    def __init__(self, bin_s: float, season_s: float) -> None:
        """`season_s`: the period of the season, seconds; 0: none."""
        self._bin_s = bin_s
        self._season_s = season_s
        self._num = 0
        self._short = 0.0
        self._long = 0.0
        self._slope = 0.0  # per second
        # By part of the period: the mean rate in it, weighted by age; 0 of them: not seen yet.
        self._season = [0.0] * _SEASON_BINS
        self._season_num = [0] * _SEASON_BINS
        self._errors = [0.0] * len(NAMES)
        self._made: deque[tuple[int, list[float]]] = deque()  # due at which observation
        self._recent: deque[float] = deque(maxlen=max(1, round(30.0 / bin_s)))

    @property
    def best(self) -> int:
        """Which forecast is followed: the index of its name."""
        best = SHORT
        for number in range(1, len(NAMES)):
            if self._errors[number] < self._errors[best]:
                best = number
        return best

    @property
    def num_observed(self) -> int:
        """Observations so far."""
        return self._num

    def observe(self, rate: float, horizon_s: float) -> None:
        """Take in the next bin's rate, and note what is expected `horizon_s` after it."""
        self._recent.append(rate)
        self._judge()
        before = self._short
        self._short = self._smoothed(self._short, rate, _SHORT_S)
        self._long = self._smoothed(self._long, rate, _LONG_S)
        slope = (self._short - before) / self._bin_s if self._num else 0.0
        self._slope = self._smoothed(self._slope, slope, _TREND_S)
        if self._season_s:
            self._observe_season(rate)
        self._num += 1
        num_ahead = max(1, math.ceil(horizon_s / self._bin_s))
        self._made.append((self._num + num_ahead, self.all_ahead(horizon_s)))

    def ahead(self, horizon_s: float) -> float:
        """Return the rate that is expected so many seconds from now, by the best forecast."""
        return self.all_ahead(horizon_s)[self.best]

    def all_ahead(self, horizon_s: float) -> list[float]:
        """Return what each forecast expects, in the order of `NAMES`; no rate is negative."""
        # A trend ends some time: the sum of its damped slopes, as by Gardner and McKenzie (1985).
        keep = math.log(_DAMPING) / 60.0
        lasting_s = (math.exp(keep * horizon_s) - 1.0) / keep
        trend = max(0.0, self._short + self._slope * lasting_s)
        return [self._short, self._long, trend, self._seasonal(horizon_s)]

    def jump_to(self, rate: float) -> None:
        """Take it that the level has changed for good: what was before says nothing any more.

        What was expected for the time to come stays and will be found wrong, but for a season that
        knew of it.
        """
        self._short = self._long = rate
        self._slope = 0.0

    def _smoothed(self, mean: float, value: float, memory_s: float) -> float:
        """Return an exponentially weighted mean; over few values the plain mean of all."""
        share = max(1.0 / (self._num + 1), self._bin_s / memory_s)
        return mean + min(1.0, share) * (value - mean)

    def _judge(self) -> None:
        """Compare what was expected of now with what has come."""
        came = sum(self._recent) / len(self._recent)
        share = min(1.0, self._bin_s / _ERROR_S)
        while self._made and self._made[0][0] <= self._num + 1:
            _, rates = self._made.popleft()
            for number, rate in enumerate(rates):
                self._errors[number] += share * (abs(rate - came) - self._errors[number])

    def _part(self, time_s: float) -> int:
        return int(time_s % self._season_s / self._season_s * _SEASON_BINS) % _SEASON_BINS

    def _observe_season(self, rate: float) -> None:
        now_s = self._num * self._bin_s
        part = self._part(now_s)
        if self._season_num[part] == 0 or self._part(now_s - self._bin_s) != part:
            # A new part begins: what earlier periods had in it counts as one observation less.
            self._season_num[part] = 1 if self._season_num[part] else 0
        num = self._season_num[part] + 1
        share = max(1.0 / num, _SEASON_WEIGHT * self._bin_s * _SEASON_BINS / self._season_s)
        self._season[part] += min(1.0, share) * (rate - self._season[part])
        self._season_num[part] = num

    def _seasonal(self, horizon_s: float) -> float:
        """Return the level times what the season did from here on, a period ago."""
        if not self._season_s or self._num * self._bin_s < self._season_s:
            return self._short
        now_s = self._num * self._bin_s
        then = self._around(now_s + horizon_s)
        # The level is about as old as its memory.
        now = self._around(now_s - _SHORT_S / 2.0)
        if now <= _MIN_SHARE:
            return max(self._short, then)
        return min(self._short * then / now, max(self._short, 2.0 * max(self._season)))

    def _around(self, time_s: float) -> float:
        """Return the season's mean around a time: one part alone is too noisy."""
        part, sum_, num = self._part(time_s), 0.0, 0
        for other in range(part - 1, part + 2):
            each = other % _SEASON_BINS
            if self._season_num[each]:
                sum_ += self._season[each]
                num += 1
        return sum_ / num if num else self._short
