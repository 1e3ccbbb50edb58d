"""By the time of a known reply a machine's pace can be told."""

import pytest

from benchmarks.pace_probe import expected_reply_s, slowness
from benchmarks.profile import Profile

PROFILE = Profile(
    name="test",
    model="none",
    device="none",
    source="made up",
    max_model_len=1000,
    max_num_seqs=8,
    max_num_batched_tokens=256,
    max_prefill_chunk=128,
    num_kv_tokens=16_000,
    path_s=0.05,
    base_s=0.1,
    s_per_token=0.004,
    noise=0.1,
)


def test_what_a_reply_takes_by_its_profile() -> None:
    """Two chunks of 128, then 23 tokens, and the way there and back."""
    steps_s = 2 * (0.1 + 128 * 0.004) + 23 * (0.1 + 0.004)
    assert expected_reply_s(PROFILE, 2) == pytest.approx(steps_s + 0.05, abs=0.002)


@pytest.mark.parametrize("factor", [0.9, 1.0, 1.3])
def test_finds_how_slow_memory_is(factor: float) -> None:
    reply_s = expected_reply_s(PROFILE.slowed(factor), 2)
    assert slowness(PROFILE, 2, reply_s) == pytest.approx(factor, abs=0.005)
