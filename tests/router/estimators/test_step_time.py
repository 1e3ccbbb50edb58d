import random

import pytest

from router.estimators.step_time import StepModel
from tests.support.builders import info, snapshot, stepped

BASE_S, TOKEN_S, DECODE_S = 0.04, 0.0017, 0.0006  # SmolLM2 on one core, measured


def train(model: StepModel, rng: random.Random, *, num_steps: int, first: int = 1, speed=1.0):
    """Steps of mixed work, 10 % noise, one in fifty stretched tenfold by a neighbour."""
    for seq in range(first, first + num_steps):
        prefill, decodes = rng.choice([0, 0, 100, 512]), rng.randrange(1, 16)
        step_s = (BASE_S + TOKEN_S * prefill + DECODE_S * decodes) / speed * rng.gauss(1.0, 0.1)
        step_s *= 10.0 if rng.random() < 0.02 else 1.0
        model.learn(stepped(seq, step_s, prefill=prefill, decodes=decodes))


def true_s(prefill: int, decodes: int) -> float:
    return BASE_S + TOKEN_S * prefill + DECODE_S * decodes


@pytest.mark.parametrize("seed", range(5))
def test_learns_an_engine_through_noise_and_outliers(seed):
    model = StepModel()
    train(model, random.Random(seed), num_steps=400)
    for prefill, decodes in [(0, 1), (0, 16), (100, 4), (512, 8), (1000, 0)]:
        assert model.step_s(prefill, decodes) == pytest.approx(true_s(prefill, decodes), rel=0.08)


def test_follows_an_engine_that_becomes_slower():
    model, rng = StepModel(), random.Random(0)
    train(model, rng, num_steps=500)
    train(model, rng, num_steps=2500, first=501, speed=0.5)
    assert model.step_s(512, 4) == pytest.approx(2.0 * true_s(512, 4), rel=0.1)


def test_decoding_for_hours_does_not_forget_what_prefill_costs():
    model, rng = StepModel(), random.Random(0)
    train(model, rng, num_steps=400)
    token_s = model.token_s
    for seq in range(401, 10_000):
        model.learn(stepped(seq, true_s(0, 4) * rng.gauss(1.0, 0.1), decodes=4))
    assert model.token_s == pytest.approx(token_s, rel=0.03)


def test_prefill_is_learned_at_once_after_decoding_as_even_as_clockwork():
    """As on an H100: what is usual among decode steps says nothing about the first prompts."""
    model = StepModel()
    for seq in range(1, 400):
        model.learn(stepped(seq, 0.0061, decodes=1))
    for seq in range(400, 404):
        model.learn(stepped(seq, 0.006 + 18e-6 * 1000, prefill=1000, decodes=0))
    assert model.token_s == pytest.approx(18e-6, rel=0.05)


def test_what_small_prompts_could_not_tell_is_learned_from_few_large_ones():
    model, rng = StepModel(), random.Random(0)
    for seq in range(1, 400):
        model.learn(stepped(seq, 0.0061 * rng.gauss(1.0, 0.01), prefill=10 + seq % 10, decodes=1))
    for seq in range(400, 416):
        step_s = (0.006 + 18e-6 * 8000) * rng.gauss(1.0, 0.01)
        model.learn(stepped(seq, step_s, prefill=8000, decodes=1))
    assert model.step_s(8000, 1) == pytest.approx(0.15, rel=0.1)


def test_the_first_step_counts():
    """From the guess to the right order of magnitude at once, and to the right term."""
    model = StepModel()
    model.learn(stepped(1, 0.9, prefill=512))
    assert model.step_s(512, 0) == pytest.approx(0.9, rel=0.05)
    assert model.token_s > 0.001


def test_coefficients_are_never_negative():
    """Batches of 4 are faster than of 1 on SmolLM2; a straight line would go below zero."""
    model = StepModel()
    for seq in range(1, 200):
        decodes = 1 + seq % 16
        model.learn(stepped(seq, 0.05 - 0.002 * decodes, decodes=decodes))
    assert min(model.step_base_s, model.token_s, model.decode_s) >= 0.0
    assert model.step_s(0, 8) == pytest.approx(0.034, rel=0.3)


def test_one_step_is_learned_once():
    """A snapshot without a new step repeats the last one's figures."""
    model = StepModel()
    report = stepped(1, 0.9, prefill=512)
    model.learn(report)
    model.learn(report)
    assert model.num_steps == 1


def test_a_measured_rate_replaces_the_guess():
    """The engine ran before this gateway did."""
    model = StepModel()
    model.learn(snapshot(prefill_tokens_per_s=500.0))
    assert model.token_s == pytest.approx(1 / 500)


def test_prefill_rate_counts_the_overhead_of_steps():
    model = StepModel()
    model.step_base_s, model.token_s, model.decode_s = 0.1, 0.01, 0.0
    assert model.prefill_tokens_per_s(info(), 0) == pytest.approx(100 / 1.1)
    assert model.prefill_tokens_per_s(info(), 50) == pytest.approx(50 / 0.6)
    assert model.prefill_tokens_per_s(info(), 1000) == pytest.approx(1 / 0.11)


def test_an_engine_without_steps_starts_from_what_another_has_learned():
    old, new = StepModel(), StepModel()
    for seq in range(1, 100):
        prefill, decodes = 100 * (seq % 3), 1 + seq % 7
        step_s = 0.006 + 2e-5 * prefill + 1e-4 * decodes
        old.learn(stepped(seq, step_s, prefill=prefill, decodes=decodes))
    new.start_from(old)
    assert new.step_s(2000, 10) == pytest.approx(old.step_s(2000, 10))
    # Its own steps then count for more than where it started from.
    for seq in range(1, 50):
        new.learn(stepped(seq, 0.012 + 4e-5 * 100 * (seq % 3), prefill=100 * (seq % 3), decodes=1))
    assert new.step_s(200, 1) == pytest.approx(0.02, rel=0.1)


def test_an_engine_with_steps_of_its_own_keeps_them():
    old, new = StepModel(), StepModel()
    new.learn(stepped(1, 0.9, prefill=512))
    new.start_from(old)
    assert new.step_s(512, 0) == pytest.approx(0.9, rel=0.05)


def test_what_costs_nothing_elsewhere_can_still_be_learned():
    old, new = StepModel(), StepModel()
    old.step_base_s, old.token_s, old.decode_s = 0.01, 1e-5, 0.0
    new.start_from(old)
    for seq in range(1, 200):
        new.learn(stepped(seq, 0.01 + 1e-3 * (seq % 20), decodes=seq % 20))
    assert new.decode_s == pytest.approx(1e-3, rel=0.1)
