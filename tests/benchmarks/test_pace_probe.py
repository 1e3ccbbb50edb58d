"""By the time of a known reply a machine's pace can be told."""

import pytest

from benchmarks.pace_probe import expected_reply_s
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


def test_twice_as_slow_takes_twice_as_long() -> None:
    alone_s, slow_s = (expected_reply_s(each, 2) - 0.05 for each in (PROFILE, PROFILE.slowed(2.0)))
    assert slow_s / alone_s == pytest.approx(2.0, rel=0.01)
