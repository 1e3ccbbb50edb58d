"""The steps of a run tell how fast the machine was."""

import random

import pytest

from benchmarks.fidelity.step_time_factors import fit_step_time_factors
from router.simulation.engine.profile import StepTimeFactors
from serving.capacity.step_fit import Step
from tests.support.vllm_scheduler import make_profile

PROFILE = make_profile(
    base_s=0.1,
    s_per_token=0.004,
    s_per_decode_req=0.002,
    s_per_context_token=1e-5,
    s_per_prefill_pair=2e-6,
    contention=0.1,
)


def make_steps(machine: StepTimeFactors, num_steps: int) -> list[Step]:
    """Return steps of every sort, with a tenth of noise, on a machine with these factors."""
    rng = random.Random(0)
    steps = []
    for _ in range(num_steps):
        num_tokens, num_decoding = rng.choice((0, 0, 30, 128)), rng.randint(1, 8)
        num_before = rng.choice((0, 256, 1024))
        num_pairs = num_tokens * (num_before + num_tokens / 2)
        shape = num_tokens, num_decoding, 100 * num_decoding, num_pairs
        share = rng.random()
        step_s = (1.0 + 0.1 * share) * PROFILE.slowed(machine).step_cost.step_s(*shape)
        steps.append(Step(*shape, step_s * rng.gauss(1.0, 0.1), share))
    return steps


@pytest.mark.parametrize(
    "machine", [StepTimeFactors(1.0, 1.0), StepTimeFactors(0.8, 1.1), StepTimeFactors(1.4, 0.9)]
)
def test_finds_how_slow_memory_and_computing_were(machine: StepTimeFactors) -> None:
    held_up = [Step(0, 1, 100, 0.0, 9.0)] * 10  # by something else
    found = fit_step_time_factors(PROFILE, make_steps(machine, 400) + held_up)
    assert found.memory == pytest.approx(machine.memory, rel=0.03)
    assert found.compute == pytest.approx(machine.compute, rel=0.03)


def test_a_few_steps_tell_nothing() -> None:
    with pytest.raises(ValueError, match="3 steps"):
        fit_step_time_factors(PROFILE, make_steps(StepTimeFactors(1.0, 1.0), 3))
