"""By how much does each step differ from its expected time?"""

import math
import random

_TWO_PI = 2.0 * math.pi
# Factors are drawn so many pairs at a time, and dropped when so many were used.
_PAIRS = 32
_MAX_USED = 512


class StepNoise:
    """A normal factor for each step, in the order of steps, whenever it is asked for.

    A run of steps looks ahead and may be cut; the factors of the steps that were not made are
    those of the next ones. Drawn in pairs (Box and Muller 1958), the very numbers of
    `random.gauss`, which Python would compute one by one.
    """

    __slots__ = ("_deviation", "_factors", "_num_used", "_rng")

    def __init__(self, rng: random.Random, deviation: float) -> None:
        """`deviation`: the standard deviation; 0: every factor is 1."""
        self._rng = rng
        self._deviation = deviation
        self._factors: list[float] = []
        self._num_used = 0  # of these

    def factor(self, index: int) -> float:
        """Return the factor of the step that is so many after the last one made."""
        if self._deviation == 0.0:
            return 1.0
        index += self._num_used
        while len(self._factors) <= index:
            self._draw()
        return self._factors[index]

    def advance(self, num_steps: int) -> None:
        """Note that so many steps were made."""
        if self._deviation == 0.0:
            return
        self._num_used += num_steps
        if self._num_used > _MAX_USED:
            del self._factors[: self._num_used]
            self._num_used = 0

    def _draw(self) -> None:
        random, factors, deviation = self._rng.random, self._factors, self._deviation
        for _ in range(_PAIRS):
            angle = random() * _TWO_PI
            radius = math.sqrt(-2.0 * math.log(1.0 - random()))
            one = 1.0 + math.cos(angle) * radius * deviation
            other = 1.0 + math.sin(angle) * radius * deviation
            factors.append(one if one > 0.0 else 0.0)
            factors.append(other if other > 0.0 else 0.0)
