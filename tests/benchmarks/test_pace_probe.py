"""By the time of a known reply a machine's pace can be told."""

import pytest

from benchmarks.pace_probe import expected_reply, pace
from benchmarks.profile import Pace, Profile

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
    reply = expected_reply(PROFILE, 2)
    assert reply.ttft_s == pytest.approx(2 * (0.1 + 128 * 0.004) + 0.05, abs=0.002)
    assert reply.rest_s == pytest.approx(23 * (0.1 + 0.004), abs=0.002)


@pytest.mark.parametrize(("memory", "compute"), [(1.0, 1.0), (0.9, 1.1), (1.3, 1.0), (1.2, 0.8)])
def test_finds_how_slow_memory_and_computing_are(memory: float, compute: float) -> None:
    found = pace(PROFILE, 2, expected_reply(PROFILE.slowed(Pace(memory, compute)), 2))
    assert found.memory == pytest.approx(memory, abs=0.005)
    assert found.compute == pytest.approx(compute, abs=0.005)
