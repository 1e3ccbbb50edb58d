"""How fast a shared machine was during a run, by the steps that its engines took in it."""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import least_squares

from router.simulation.engine.profile import Pace, Profile
from serving.capacity.step_fit import Step

_MIN_STEPS = 20


def pace(profile: Profile, steps: Sequence[Step]) -> Pace:
    """Return the pace at which the profile's steps would have taken as long as these.

    Of least squared logarithms of the ratio, so that too long and too short count alike,
    outliers counting less. Raises `ValueError` where there are fewer than 20 steps.
    """
    if len(steps) < _MIN_STEPS:
        raise ValueError(f"{len(steps)} steps do not tell a machine's pace, {_MIN_STEPS} would")

    def errors(terms: Sequence[float]) -> np.ndarray:
        slowed = profile.slowed(Pace(*terms))
        return np.log(
            [
                (1.0 + profile.contention * step.share_beside)
                * slowed.step_s(
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
    return Pace(*found.x.tolist())
