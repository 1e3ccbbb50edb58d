"""How long would a request take on an engine that has nothing else to do? Without noise.

What `EngineModel` would come to, step by step, summed in closed form for many requests at once.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.simulation.engine.profile import Profile

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int_]


@dataclass(frozen=True)
class UnloadedTimes:
    """Seconds on an idle engine with an empty prefix cache, [num_requests] each."""

    first_s: _Floats  # to the first token
    each_s: _Floats  # per token after it, on average; 0 where there is none
    whole_s: _Floats  # to the last token

    @classmethod
    def of(
        cls, num_prompt_tokens: _Ints, num_output_tokens: _Ints, profile: Profile
    ) -> "UnloadedTimes":
        """Return the times of requests of these sizes."""
        first_s = prefill_s(num_prompt_tokens, profile)
        num_more = num_output_tokens - 1
        decode_s = _decode_s(num_prompt_tokens, num_more, profile)
        return cls(first_s, decode_s / np.maximum(1, num_more), first_s + decode_s)


def prefill_s(num_prompt_tokens: _Ints, profile: Profile) -> _Floats:
    """Return the time to first token: the prompt alone, in full steps, seconds."""
    size = profile.max_num_batched_tokens
    num_full = (num_prompt_tokens - 1) // size  # steps before the last one
    num_before = num_full * size
    num_rest = num_prompt_tokens - num_before
    full_pairs = num_before * num_before / 2.0  # of attention: sum of size * (before + size / 2)
    rest_pairs = num_rest * (num_before + num_rest / 2.0)
    rest_s: _Floats = np.maximum(profile.floor_s, profile.base_s + profile.s_per_token * num_rest)
    pairs_s: _Floats = profile.s_per_prefill_pair * (full_pairs + rest_pairs)
    return num_full * profile.step_cost.step_s(size, 0, 0, 0.0) + rest_s + pairs_s


def _decode_s(num_prompt_tokens: _Ints, num_steps: _Ints, profile: Profile) -> _Floats:
    """Return the seconds of so many steps in which one sequence decodes after its first token."""
    num_context_tokens = num_steps * num_prompt_tokens + num_steps * (num_steps + 1) / 2.0
    each_s = profile.step_cost.step_s(0, 1, 0, 0.0)
    return num_steps * each_s + profile.s_per_context_token * num_context_tokens
