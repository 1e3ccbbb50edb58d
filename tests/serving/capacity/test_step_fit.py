import dataclasses
import random

import pytest

from router.simulation.engine.profile import Profile
from serving.capacity.profiles import FOLDER, ProfileError, load_profile, save_profile
from serving.capacity.step_fit import TERMS, Step, fit


def make_profile(**terms: float) -> Profile:
    defaults = {
        "name": "test",
        "model": "none",
        "device": "none",
        "source": "made up",
        "max_model_len": 100,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 100,
        "num_kv_tokens": 1600,
        "base_s": 0.0,
        "s_per_token": 1.0,
    }
    return Profile(**(defaults | terms))


def make_steps(profile: Profile, noise: float) -> list[Step]:
    rng = random.Random(0)
    steps = []
    for _ in range(400):
        prefill = rng.choice([0, 0, 16, 128, 1024, 8192])
        decode = rng.choice([0, 1, 8, 64]) if prefill else rng.choice([1, 8, 64])
        sizes = prefill, decode, decode * rng.choice([100, 4000]), prefill**2 / 2
        steps.append(Step(*sizes, profile.step_cost.step_s(*sizes) * rng.gauss(1.0, noise)))
    return steps


@pytest.mark.parametrize("floor_s", [0.0, 0.006])
def test_finds_the_terms_behind_noisy_steps(floor_s: float) -> None:
    truth = make_profile(
        base_s=0.002,
        s_per_token=2e-5,
        s_per_decode_req=1e-5,
        s_per_context_token=4e-8,
        s_per_prefill_pair=1e-9,
        floor_s=floor_s,
    )
    fitted, error = fit(make_steps(truth, noise=0.02), make_profile())
    assert error == pytest.approx(0.02, rel=0.2)
    for name in ("base_s", "s_per_token", "s_per_context_token", "s_per_prefill_pair", "floor_s"):
        assert getattr(fitted, name) == pytest.approx(getattr(truth, name), rel=0.15), name


def test_finds_the_terms_behind_sums_of_steps() -> None:
    """A prompt's steps, of which only the whole is known, among single ones that decode."""
    truth = make_profile(base_s=0.006, s_per_token=2e-5, s_per_context_token=4e-8)
    rng = random.Random(2)
    steps = []
    for _ in range(200):
        num_steps, num_tokens = rng.choice([(2, 512), (5, 4096), (9, 8192), (1, 0)])
        num_decodes, context = num_steps * rng.choice([1, 16]), num_steps * rng.choice([100, 4000])
        step_s = truth.base_s * num_steps + truth.s_per_token * (num_tokens + num_decodes)
        step_s = (step_s + truth.s_per_context_token * context) * rng.gauss(1.0, 0.02)
        steps.append(Step(num_tokens, num_decodes, context, 0.0, step_s, num_steps=num_steps))
    fitted, error = fit(steps, make_profile())
    assert error == pytest.approx(0.02, rel=0.2)
    for name in ("base_s", "s_per_token"):
        assert getattr(fitted, name) == pytest.approx(getattr(truth, name), rel=0.05), name


def test_finds_what_neighbours_cost() -> None:
    truth = make_profile(base_s=0.002, s_per_token=2e-5, s_per_context_token=4e-8)
    rng = random.Random(1)
    steps = []
    for each in make_steps(truth, noise=0.02):
        share = rng.choice([0.0, 0.4, 1.0])
        step_s = each.step_s * (1.0 + 0.3 * share)
        steps.append(dataclasses.replace(each, step_s=step_s, share_beside=share))
    fitted, error = fit(steps, make_profile())
    assert fitted.contention == pytest.approx(0.3, abs=0.02)
    assert fitted.base_s == pytest.approx(0.002, rel=0.1)
    assert error == pytest.approx(0.02, rel=0.2)
    beside = [dataclasses.replace(each, share_beside=1.0) for each in steps]
    assert fit(beside, make_profile())[0].contention == 0.0  # nothing to compare with


def test_too_few_steps() -> None:
    with pytest.raises(ValueError, match="too few"):
        fit([Step(1, 0, 0, 0.5, 0.1)], make_profile())


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_profiles_in_the_package(path, tmp_path) -> None:
    profile = load_profile(path.stem)
    assert profile.name == path.stem
    assert profile.source.strip()
    copy = tmp_path / "copy.yaml"
    save_profile(profile, copy)
    assert load_profile(copy) == profile
    assert all(getattr(profile, name) >= 0 for name in TERMS)


def test_bad_profiles_say_what_to_change(tmp_path) -> None:
    with pytest.raises(ProfileError, match=r"h1000.*there are .*h100-llama8b"):
        load_profile("h1000")
    path = tmp_path / "bad.yaml"
    path.write_text("name: x\nnoize: 1\n")
    with pytest.raises(ProfileError, match="noize"):
        load_profile(path)
    path.write_bytes(b"name: \xff\n")
    with pytest.raises(ProfileError, match="utf-8"):
        load_profile(path)
    with pytest.raises(ValueError, match="less than max_model_len"):
        make_profile(max_model_len=2000)
    with pytest.raises(ValueError, match="no time"):
        make_profile(s_per_token=0.0)
