"""How fast do requests leave the hold queue of a model?"""

import math

# Departures count 1/e after so much backlogged time: some engine steps, and a change
# of load is seen within seconds.
_MEMORY_S = 5.0
_LEAST_S = 0.5  # of backlogged time, before which a rate says nothing
_SURE_TIMES = 4.0  # departures: with so many the rate is known to a factor of two


class DepartureRate:
    """Prompt tokens per second that engines have taken from a queue that was never empty.

    Whatever engines are short of (prefill, KV blocks, sequences) shows in it, whereas
    a prediction by prefill rates knows only of prefill.
    """

    __slots__ = ("_at_s", "_num_times", "_num_tokens", "_time_s", "_was_backlogged")

    def __init__(self, now_s: float) -> None:
        self._at_s = now_s
        self._time_s = 0.0  # backlogged, decayed
        self._num_tokens = 0.0  # that left in that time, decayed
        self._num_times = 0.0  # calls in which some left, decayed
        self._was_backlogged = False

    def record_departures(self, num_tokens: int, is_backlogged: bool, now_s: float) -> None:
        """Count prompt tokens that left since the last call; `is_backlogged` if some still wait."""
        if self._was_backlogged:
            passed_s = max(0.0, now_s - self._at_s)
            keep = math.exp(-passed_s / _MEMORY_S)
            self._time_s = self._time_s * keep + _MEMORY_S * (1.0 - keep)
            self._num_tokens = self._num_tokens * keep + num_tokens
            self._num_times = self._num_times * keep + (num_tokens > 0)
        self._at_s = now_s
        self._was_backlogged = is_backlogged

    @property
    def is_sure(self) -> bool:
        """Whether enough has left lately to tell a rate from chance."""
        return self._num_times >= _SURE_TIMES

    def wait_s(self, num_tokens: int) -> float:
        """Return the seconds in which so many tokens should leave; 0 while nothing is known."""
        if self._time_s < _LEAST_S:
            return 0.0
        return num_tokens * self._time_s / max(self._num_tokens, 1.0)
