"""How long do the scheduler steps of an engine take? Learned from its own snapshots.

    step_s = step_base_s + token_s * num_prefill_tokens + decode_s * num_decode_reqs

Base and decode terms are what a step costs to run at all and per sequence in
it; `token_s` is the inverse of the prefill rate. Attention makes both grow with
context, which the linear form leaves to forgetting: it follows the contexts of
the moment (R² of TTFT predicted this way on SmolLM2: 0.97).
"""

import math

import msgspec

from router.types import EngineInfo, EngineSnapshot

# Guesses for an engine that has not reported a step: the middle, on a log scale,
# between a small model on one CPU core (40 ms, 1.7 ms/token) and an 8B model on
# an H100 (8 ms, 40 µs/token). They decide nothing but the first few requests of a kind of engine.
_GUESS = (0.02, 2.5e-4, 1e-4)  # base, prefilled token, decoding sequence, seconds

# Steps scatter by about 10 %, the guess may be wrong tenfold: (0.1 / 10)² of one
# step. It decides only what the steps seen so far cannot (say base against
# token time, when all were equal).
_PRIOR_WEIGHT = 1e-4

# A step counts 1/e after so many later ones of its kind: averages out noise of
# 10 % to 0.5 %, and follows a change within seconds on a GPU.
_MEMORY_STEPS = 512
_KEEP = 1.0 - 1.0 / _MEMORY_STEPS

# A step whose error is beyond three times the usual absolute error counts as much less as it
# is beyond. For normal noise (mean absolute error 0.8 sigma) this touches 2 % of the steps; a
# step that was stretched tenfold by a neighbour then moves hardly anything. Its weight is cut
# rather than its error: a false value that counts in full would outweigh the true ones after it.
_LARGEST_ERROR = 3.0
_ERROR_MEMORY_STEPS = 64  # its average is then sure to about a tenth
_COLD_ERROR = 1.0 / 3.0  # up to twice the prediction counts in full until errors are known
_MIN_ERROR = 0.01  # so that a stretch of perfect steps cannot lock out all change
_WARM_UP_STEPS = 16  # five per coefficient; before, every error is the guess's

_Six = tuple[float, float, float, float, float, float]  # upper triangle: 00 01 02 11 12 22
_Three = tuple[float, float, float]


# A step with prefill that lasts longer than predicted (attention to long contexts is not in the
# model) is not about to end: it goes on for about so much of what it has lasted. The mean residual
# life of a prediction that is off by a third, past its end, is 0.2 to 0.3.
LATE_SHARE = 0.25


class StepModelState(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine's steps are taken to cost."""

    num_steps: int  # learned from
    step_base_s: float
    token_s: float  # per prefilled token
    decode_s: float  # per decoding sequence


class StepModel:
    """Online estimate of the three coefficients of one engine's step time.

    Exponentially weighted least squares (Ljung, *System Identification*, 2nd
    ed., 11.2) of the *relative* error, so that a 2 ms decode step teaches as
    much as a 900 ms prefill step; weighted after Huber (1964); ridge
    prior at the cold-start guess (Hoerl and Kennard 1970), or at what another
    engine of its kind has learned; coefficients never negative. Kept as sums, not
    as a recursive covariance: the same estimate, and it cannot wind up while the
    engine is not excited. Steps with and without prefill forget separately, so that
    minutes of mere decoding do not wipe out what prefill costs. They have errors of their own
    as well: decode steps on a GPU hardly scatter, and measured by that, all that is first
    learned of prefill would be taken for noise.
    """

    __slots__ = (
        "_last_step",
        "_start",
        "_sums_decode",
        "_sums_prefill",
        "decode_s",
        "step_base_s",
        "token_s",
    )

    def __init__(self) -> None:
        self._start: _Three = (1.0, 1.0, 1.0)  # centre of the prior, in units of the guess
        self.step_base_s, self.token_s, self.decode_s = _GUESS
        self._sums_prefill = _Sums()
        self._sums_decode = _Sums()
        self._last_step = 0

    @property
    def num_steps(self) -> int:
        """Steps that it has learned from."""
        return self._sums_prefill.num_steps + self._sums_decode.num_steps

    @property
    def is_warm(self) -> bool:
        """Whether it has learned enough steps of its own to do without the guess."""
        return self.num_steps >= _WARM_UP_STEPS

    @property
    def has_learned_much(self) -> bool:
        """Whether its number of steps has just doubled, or is 1."""
        num_steps = self.num_steps
        return num_steps > 0 and num_steps & (num_steps - 1) == 0

    def start_from(self, other: "StepModel") -> None:
        """Use what another engine has learned as the guess; ignored once warm."""
        if self.is_warm:
            return
        base, token, decode = _GUESS
        self._start = (other.step_base_s / base, other.token_s / token, other.decode_s / decode)
        self._solve()

    def step_s(self, num_prefill_tokens: int, num_decode_reqs: int) -> float:
        """Return the predicted duration of one such step, seconds."""
        return (
            self.step_base_s + self.token_s * num_prefill_tokens + self.decode_s * num_decode_reqs
        )

    def prefill_tokens_per_s(self, info: EngineInfo, num_decode_reqs: int) -> float:
        """Return the prefill rate in full steps beside so many decoding requests, tokens/s."""
        num_tokens = max(1, info.max_num_batched_tokens - num_decode_reqs)
        return num_tokens / max(1e-9, self.step_s(num_tokens, num_decode_reqs))

    def learn(self, snapshot: EngineSnapshot) -> None:
        """Learn from the last step of a snapshot, unless that is done already."""
        if not self.num_steps and snapshot.prefill_tokens_per_s > 0.0:
            # An engine that ran before we met it knows its own rate better than we can guess.
            self.token_s = 1.0 / snapshot.prefill_tokens_per_s
            base, _, decode = self._start
            self._start = (base, self.token_s / _GUESS[1], decode)
        is_new = snapshot.num_steps_total != self._last_step
        self._last_step = snapshot.num_steps_total
        if is_new:
            self.learn_step(
                snapshot.step_s, snapshot.step_num_prefill_tokens, snapshot.step_num_decode_reqs
            )

    def learn_step(self, step_s: float, num_tokens: int, num_decodes: int) -> None:
        """Learn from a step that took so long with so many tokens to prefill and sequences."""
        if step_s <= 0.0 or num_tokens + num_decodes <= 0:
            return
        sums = self._sums_prefill if num_tokens else self._sums_decode
        if sums.num_steps < _WARM_UP_STEPS:
            reference_s = step_s
            weight = 1.0
        else:
            # Relative to the prediction: to the noisy step itself it would favour fast ones.
            reference_s = max(1e-9, self.step_s(num_tokens, num_decodes))
            weight = sums.weight(step_s / reference_s - 1.0)
        base, token, decode = _GUESS
        share = math.sqrt(weight) / reference_s
        sums.add(
            base * share,
            token * num_tokens * share,
            decode * num_decodes * share,
            step_s * share,
        )
        self._solve()

    def state(self) -> StepModelState:
        """Return the coefficients as they are now."""
        return StepModelState(
            num_steps=self.num_steps,
            step_base_s=self.step_base_s,
            token_s=self.token_s,
            decode_s=self.decode_s,
        )

    def _solve(self) -> None:
        """Set the coefficients to the minimum of the weighted squared errors."""
        p, d = self._sums_prefill, self._sums_decode
        k = _PRIOR_WEIGHT
        a = (
            p.a00 + d.a00 + k,
            p.a01 + d.a01,
            p.a02 + d.a02,
            p.a11 + d.a11 + k,
            p.a12 + d.a12,
            p.a22 + d.a22 + k,
        )
        base, token, decode = self._start
        b = (p.b0 + d.b0 + k * base, p.b1 + d.b1 + k * token, p.b2 + d.b2 + k * decode)
        x0, x1, x2 = _solve_non_negative(a, b)
        base, token, decode = _GUESS
        self.step_base_s, self.token_s, self.decode_s = x0 * base, x1 * token, x2 * decode


class _Sums:
    """Decaying sums of products of (base, token, decode) shares and of the target."""

    __slots__ = ("_error", "a00", "a01", "a02", "a11", "a12", "a22", "b0", "b1", "b2", "num_steps")

    def __init__(self) -> None:
        self.num_steps = 0
        self._error = _COLD_ERROR  # usual absolute relative error of one step
        self.a00 = self.a01 = self.a02 = self.a11 = self.a12 = self.a22 = 0.0
        self.b0 = self.b1 = self.b2 = 0.0

    def add(self, z0: float, z1: float, z2: float, target: float) -> None:
        """Add one step and let all earlier ones count a little less."""
        self.a00 = _KEEP * self.a00 + z0 * z0
        self.a01 = _KEEP * self.a01 + z0 * z1
        self.a02 = _KEEP * self.a02 + z0 * z2
        self.a11 = _KEEP * self.a11 + z1 * z1
        self.a12 = _KEEP * self.a12 + z1 * z2
        self.a22 = _KEEP * self.a22 + z2 * z2
        self.b0 = _KEEP * self.b0 + z0 * target
        self.b1 = _KEEP * self.b1 + z1 * target
        self.b2 = _KEEP * self.b2 + z2 * target
        self.num_steps += 1

    def weight(self, error: float) -> float:
        """Return the weight of a step of this relative error, 0-1, and learn the usual error."""
        limit = _LARGEST_ERROR * self._error
        counted = min(limit, abs(error))
        self._error += (max(counted, _MIN_ERROR) - self._error) / _ERROR_MEMORY_STEPS
        return counted / abs(error) if error else 1.0


def _solve_non_negative(a: _Six, b: _Three) -> _Three:
    """Return the solution of `a x = b`, [3], `a` positive definite, negative entries held at 0.

    Active set, dropping the most negative unknown and solving again (after
    Lawson and Hanson 1974, chapter 23): at most three rounds.
    """
    for _ in range(2):
        x = _solve(a, b)
        if x[0] >= 0.0 and x[1] >= 0.0 and x[2] >= 0.0:
            return x
        lowest = min(x)
        a00, a01, a02, a11, a12, a22 = a
        if lowest == x[0]:
            a, b = (1.0, 0.0, 0.0, a11, a12, a22), (0.0, b[1], b[2])
        elif lowest == x[1]:
            a, b = (a00, 0.0, a02, 1.0, 0.0, a22), (b[0], 0.0, b[2])
        else:
            a, b = (a00, a01, 0.0, a11, 0.0, 1.0), (b[0], b[1], 0.0)
    x = _solve(a, b)
    return (max(0.0, x[0]), max(0.0, x[1]), max(0.0, x[2]))


def _solve(a: _Six, b: _Three) -> _Three:
    """Return the solution of `a x = b`, [3], by elimination; stable as `a` is positive definite."""
    a00, a01, a02, a11, a12, a22 = a
    b0, b1, b2 = b
    f1, f2 = a01 / a00, a02 / a00
    c11, c12, c22 = a11 - f1 * a01, a12 - f1 * a02, a22 - f2 * a02
    d1, d2 = b1 - f1 * b0, b2 - f2 * b0
    f3 = c12 / c11
    x2 = (d2 - f3 * d1) / (c22 - f3 * c12)
    x1 = (d1 - c12 * x2) / c11
    x0 = (b0 - a01 * x1 - a02 * x2) / a00
    return x0, x1, x2
