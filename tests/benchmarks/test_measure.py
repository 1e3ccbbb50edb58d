"""A profile measured on an emulated engine is the profile that it emulates."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.measure import measure
from benchmarks.profile import Profile
from serving.config import parse
from serving.hardware import Hardware
from serving.plan import plan


async def test_finds_what_the_engine_was_made_of(tmp_path: Path) -> None:
    path = tmp_path / "truth.yaml"
    truth = Profile(
        name="truth",
        model="small",
        device="none",
        source="made up",
        max_model_len=1024,
        max_num_seqs=16,
        max_num_batched_tokens=256,
        num_kv_tokens=20_000,
        base_s=0.001,
        s_per_token=2e-5,
        s_per_context_token=1e-6,
        s_per_prefill_pair=2e-8,
        noise=0.02,
    )
    truth.save(path)
    factory = "benchmarks.emulated:EmulatedEngine"
    config = parse({"engine": {"factory": factory, "args": {"profile": str(path)}}})
    hardware = Hardware(cores=(0,), num_ram_bytes=1 << 34, num_free_ram_bytes=1 << 34, gpus=())
    console = Console(file=io.StringIO())
    found = await measure(config, plan(config, hardware), "found", console)
    assert (found.name, found.max_num_seqs, found.num_kv_tokens) == ("found", 16, 20_000)
    assert found.noise == pytest.approx(0.02, rel=0.3)
    assert "emulated" in found.source
    for sizes in ((0, 1, 100, 0.0), (0, 16, 4000, 0.0), (256, 1, 100, 32_768.0)):
        assert found.step_s(*sizes) == pytest.approx(truth.step_s(*sizes), rel=0.05)
