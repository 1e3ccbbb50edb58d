"""How much has an engine prefilled lately?"""

import math

# A prompt counts 1/e after so long. A reply, whose time per token is what is asked for, takes a
# second or two on a GPU and ten on a CPU core; of 1 to 16 s, simulated on both, none is better
# at both.
_MEMORY_S = 8.0


class PrefillRate:
    """Prompt tokens that an engine computes per second, exponentially weighted.

    From the engine's running total, so that no step is missed where one snapshot covers several.
    """

    __slots__ = ("_num_tokens", "_recorded_s", "_total")

    def __init__(self) -> None:
        self._total: int | None = None  # an engine may have run for long before we met it
        self._recorded_s = 0.0
        self._num_tokens = 0.0  # decayed until then

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second as of the last record; too low in the first seconds, never too high."""
        return self._num_tokens / _MEMORY_S

    def record_total(self, num_tokens_total: int, now_s: float) -> None:
        """Take in how many tokens the engine has prefilled since its start."""
        if self._total is not None:
            age_s = max(0.0, now_s - self._recorded_s)
            self._num_tokens *= math.exp(-age_s / _MEMORY_S)
            self._num_tokens += max(0, num_tokens_total - self._total)
        self._total, self._recorded_s = num_tokens_total, now_s
