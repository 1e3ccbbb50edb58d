"""Which terms of a profile explain the measured steps best?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares, lsq_linear

from router.simulation.engine.profile import Profile

TERMS = (
    "base_s",
    "s_per_token",
    "s_per_decode_req",
    "s_per_context_token",
    "s_per_prefill_pair",
    "floor_s",
)

# Contention is fitted to the difference between steps beside others and steps alone. With less
# contrast it would be fitted to noise.
_MIN_CONTRAST = 0.5
_FIRST_CONTENTION = 0.1  # start of the search


@dataclass(frozen=True, slots=True)
class Step:
    """A measured step: what it computed and how long it took.

    Or several whose sums alone are known: then all counts are sums.
    """

    num_prefill_tokens: int
    num_decode_reqs: int
    num_decode_context_tokens: int
    num_prefill_pairs: float  # as in `StepCost.step_s`
    step_s: float
    share_beside: float = 0.0  # of its time during which the machine's other engines stepped too
    num_steps: int = 1


def fit(
    steps: Sequence[Step], profile: Profile, *, has_outliers: bool = False
) -> tuple[Profile, float]:
    """Return the profile with its terms fitted, and the fit's root mean square error.

    Errors are logarithms of the fitted over the measured time, so that a step of 6 ms counts as
    much as one of 600, and too long as much as too short. No term is negative. With `has_outliers`
    errors above a tenth weigh less: now and then something else delays a measured step. Raises
    `ValueError` for fewer steps than terms.
    """
    if len(steps) < len(TERMS):
        raise ValueError(f"{len(steps)} steps are too few for {len(TERMS)} terms")
    step_s = np.array([step.step_s for step in steps])
    num_decode = np.array([step.num_decode_reqs for step in steps], float)
    num_tokens = num_decode + [step.num_prefill_tokens for step in steps]
    additive = np.column_stack(
        [
            num_decode,
            [step.num_decode_context_tokens for step in steps],
            [step.num_prefill_pairs for step in steps],
        ]
    )
    num_steps = np.array([step.num_steps for step in steps], float)
    linear = np.column_stack([num_steps, num_tokens, additive])
    # Columns of similar size: seconds per pair are 10 orders of magnitude below those per step.
    scale = np.maximum((linear / step_s[:, None]).max(axis=0), 1e-30)
    start = lsq_linear(linear / step_s[:, None] / scale, np.ones(len(steps)), (0, np.inf)).x
    scale = np.append(scale, (num_steps / step_s).max())

    beside = np.array([step.share_beside for step in steps])
    has_beside = beside.max() - beside.min() > _MIN_CONTRAST
    scale = np.append(scale, 1.0)

    def residuals(scaled: np.ndarray) -> np.ndarray:
        terms = scaled / scale
        products_s = np.maximum(terms[5] * num_steps, terms[0] * num_steps + terms[1] * num_tokens)
        slowness = 1.0 + terms[6] * beside if has_beside else 1.0
        fitted_s = slowness * (products_s + additive @ terms[2:5])
        return np.log(np.maximum(fitted_s / step_s, 1e-12))

    # The floor makes a kink: a fit that starts above it never finds it.
    starts = [
        np.concatenate([start, [0.0, _FIRST_CONTENTION]]),
        np.concatenate([[0.0], start[1:], [0.9, _FIRST_CONTENTION]]),
    ]
    bounds = (0, np.inf)
    plain = [least_squares(residuals, each, bounds=bounds, x_scale="jac") for each in starts]
    best = min(plain, key=lambda solution: solution.cost)
    if has_outliers:
        best = least_squares(
            residuals, best.x, bounds=bounds, x_scale="jac", loss="soft_l1", f_scale=0.1
        )
    terms = best.x / scale
    if terms[5] < terms[0]:  # then it never applies
        terms[5] = 0.0
    error = float(np.sqrt(np.mean(best.fun**2)))
    if not has_beside:
        terms[6] = 0.0
    values = {
        name: float(f"{value:.4g}")
        for name, value in zip((*TERMS, "contention"), terms, strict=True)
    }
    return profile.model_copy(update=values), error
