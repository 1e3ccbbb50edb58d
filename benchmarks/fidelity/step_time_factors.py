"""How fast was a shared machine during a run? Its engines' steps tell."""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import least_squares

from router.simulation.engine.profile import Profile, StepTimeFactors
from serving.capacity.step_fit import Step

_MIN_STEPS = 20


def fit_step_time_factors(profile: Profile, steps: Sequence[Step]) -> StepTimeFactors:
    """Return the factors by which the profile's steps would have taken as long as these.

    Fitted by least squares of the logarithm of the ratio, so that too long and too short count
    alike; outliers count less. Raises `ValueError` for fewer than 20 steps.
    """
    if len(steps) < _MIN_STEPS:
        raise ValueError(
            f"{len(steps)} steps cannot tell how fast the machine was: it takes {_MIN_STEPS}"
        )

    def errors(factors: Sequence[float]) -> np.ndarray:
        cost = profile.slowed(StepTimeFactors(*factors)).step_cost
        return np.log(
            [
                (1.0 + profile.contention * step.share_beside)
                * cost.step_s(
                    step.num_prefill_tokens,
                    step.num_decode_reqs,
                    step.num_decode_context_tokens,
                    step.num_prefill_pairs,
                )
                / step.step_s
                for step in steps
            ]
        )

    found = least_squares(errors, (1.0, 1.0), bounds=(0.01, 100.0), loss="soft_l1", f_scale=0.1)
    return StepTimeFactors(*found.x.tolist())
