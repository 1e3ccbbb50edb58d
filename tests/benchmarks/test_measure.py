"""A profile measured on an emulated engine is the profile that it emulates."""

import io
from pathlib import Path
from typing import ClassVar

import pytest
from rich.console import Console

from benchmarks.emulated import EmulatedEngine
from benchmarks.measure import measure
from benchmarks.profile import Profile
from serving.config import Config, parse
from serving.hardware import Hardware
from serving.plan import Plan, plan


def make_truth(folder: Path) -> tuple[Profile, str]:
    path = folder / "truth.yaml"
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
    return truth, str(path)


async def found(profile: str, num_cores: int, factory: str) -> Profile:
    config = parse({"engine": {"factory": factory, "args": {"profile": profile}}})
    cores = tuple(range(num_cores))
    hardware = Hardware(cores=cores, num_ram_bytes=1 << 34, num_free_ram_bytes=1 << 34, gpus=())
    console = Console(file=io.StringIO())
    return await measure(config, plan(config, hardware), "found", console)


async def test_finds_what_the_engine_was_made_of(tmp_path: Path) -> None:
    truth, path = make_truth(tmp_path)
    profile = await found(path, 1, "benchmarks.emulated:EmulatedEngine")
    assert (profile.name, profile.max_num_seqs, profile.num_kv_tokens) == ("found", 16, 20_000)
    assert profile.noise == pytest.approx(0.02, rel=0.3)
    assert profile.contention == 0.0
    assert "emulated" in profile.source
    for sizes in ((0, 1, 100, 0.0), (0, 16, 4000, 0.0), (256, 1, 100, 32_768.0)):
        assert profile.step_s(*sizes) == pytest.approx(truth.step_s(*sizes), rel=0.05)


class SharedCore(EmulatedEngine):
    """Steps take half as long again as soon as there are two."""

    engines: ClassVar[list["SharedCore"]] = []

    @classmethod
    async def start(cls, config: Config, plan: Plan, local_rank: int) -> "SharedCore":
        engine = await super().start(config, plan, local_rank)
        assert isinstance(engine, SharedCore)
        cls.engines.append(engine)
        if len(cls.engines) > 1:
            for each in cls.engines:
                each.model.slowness = 1.5
        return engine


async def test_finds_what_neighbours_cost(tmp_path: Path) -> None:
    truth, path = make_truth(tmp_path)
    profile = await found(path, 2, f"{__name__}:SharedCore")
    assert len(SharedCore.engines) == 2
    assert profile.contention == pytest.approx(0.5, abs=0.05)
    assert profile.step_s(256, 1, 100, 0.0) == pytest.approx(
        truth.step_s(256, 1, 100, 0.0), rel=0.05
    )
