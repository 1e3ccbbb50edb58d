"""A profile measured on emulated engines is the profile that they emulate."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from router.simulation.engine.profile import Profile
from router.types import EngineSnapshot
from serving.capacity.logged_steps import steps
from serving.capacity.profile import measure
from serving.capacity.profiles import save_profile
from serving.config import parse
from serving.engine.step_log import LoggedStep
from serving.planning.hardware import Hardware
from serving.planning.plan import make_plan


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
    save_profile(truth, path)
    return truth, str(path)


async def test_finds_what_the_engines_were_made_of(tmp_path: Path) -> None:
    truth, path = make_truth(tmp_path)
    args = {
        "engine": {
            "factory": "serving.engine.emulated.engine:EmulatedEngine",
            "args": {"profile": path},
        }
    }
    hardware = Hardware(cores=(0, 1), num_ram_bytes=1 << 34, num_free_ram_bytes=1 << 34, gpus=())
    console = Console(file=io.StringIO())
    profile = await measure(args, make_plan(parse(args), hardware), "found", console)
    assert (profile.name, profile.max_num_seqs, profile.num_kv_tokens) == ("found", 16, 20_000)
    assert "emulated" in profile.source
    assert "2 engines" in profile.source
    assert profile.noise == pytest.approx(0.02, rel=0.3)
    assert profile.contention < 0.05
    assert 0.0 < profile.path_s < 0.1
    for sizes in ((0, 1, 100, 0.0), (0, 16, 4000, 0.0), (256, 1, 100, 32_768.0)):
        assert profile.step_cost.step_s(*sizes) == pytest.approx(
            truth.step_cost.step_s(*sizes), rel=0.05
        )


def logged(ended_s: float, number: int, step_s: float, **sizes: float) -> LoggedStep:
    snapshot = EngineSnapshot(seq=0, num_steps_total=number, step_s=step_s, **sizes)
    return LoggedStep(ended_s, snapshot)


def test_steps_of_a_log() -> None:
    """A prompt of 300 tokens in two chunks beside one that decodes, then only that one."""
    decodes = {"num_running_reqs": 1, "num_decoding_reqs": 1, "num_decode_context_tokens": 50}
    both = {**decodes, "num_running_reqs": 2}
    first = {"step_num_prefill_tokens": 200, "step_num_prefill_pairs": 200 * 100.0}
    second = {"step_num_prefill_tokens": 100, "step_num_prefill_pairs": 100 * 250.0}
    log = [
        logged(10.0, 1, 1.0, step_num_decode_reqs=1, **decodes),
        logged(12.0, 2, 2.0, step_num_decode_reqs=1, **first, **both),
        logged(13.5, 3, 1.5, step_num_decode_reqs=1, **second, **decodes),
        logged(14.5, 4, 1.0, step_num_decode_reqs=1, **decodes),
    ]
    neighbour = [
        logged(11.0, 1, 1.0, step_num_decode_reqs=1, **decodes),
        logged(12.5, 2, 1.5, step_num_decode_reqs=1, **decodes),
    ]
    found = steps([log, neighbour], 0.0)
    assert [each.num_prefill_tokens for each in found] == [200, 100, 0, 0]
    assert [each.num_prefill_pairs for each in found[:2]] == [200 * 100, 100 * 250]
    assert [each.share_beside for each in found[:3]] == [1.0, pytest.approx(1 / 3), 0.0]
    assert len(steps([log], 12.0)) == 2


def test_steps_that_overlap_are_one_per_prompt() -> None:
    """The same prompt where its time and tokens are partly in the step before it."""
    decodes = {"num_running_reqs": 1, "num_decoding_reqs": 1, "num_decode_context_tokens": 50}
    both = {**decodes, "num_running_reqs": 2}
    first, second, third = (
        {"step_num_prefill_tokens": num_tokens, "step_num_prefill_pairs": num_pairs}
        for num_tokens, num_pairs in ((100, 0.0), (150, 20_000.0), (50, 25_000.0))
    )
    log = [
        logged(10.0, 1, 1.0, step_num_decode_reqs=1, **decodes),
        logged(11.5, 2, 1.5, step_num_decode_reqs=1, **first, **both),
        logged(13.5, 3, 2.0, step_num_decode_reqs=1, **second, **both),
        logged(14.0, 4, 0.5, step_num_decode_reqs=1, **third, **decodes),
        logged(15.0, 5, 1.0, step_num_decode_reqs=1, **decodes),
    ]
    prompt, decode = steps([log], 0.0, overlap=True)
    assert (prompt.num_steps, prompt.num_prefill_tokens, prompt.step_s) == (3, 300, 4.0)
    assert (prompt.num_decode_reqs, prompt.num_decode_context_tokens) == (3, 150)
    assert prompt.num_prefill_pairs == 300**2 / 2
    assert (decode.num_steps, decode.num_prefill_tokens, decode.step_s) == (1, 0, 1.0)


def test_steps_of_which_not_all_is_known() -> None:
    """One that an idle engine began, and one in which a sequence was dropped."""
    idle = logged(10.0, 1, 1.0)
    first = logged(11.0, 2, 1.0, num_running_reqs=2, num_decoding_reqs=2, step_num_decode_reqs=2)
    fewer = logged(12.0, 3, 1.0, num_running_reqs=1, num_decoding_reqs=1, step_num_decode_reqs=1)
    assert steps([[idle, first, fewer]], 0.0) == []
