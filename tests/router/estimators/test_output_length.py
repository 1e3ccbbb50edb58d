import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.estimators import output_length
from router.estimators.output_length import MeanOutputLength, OutputLengths
from tests.support.builders import req


def learned(*answers, **fields) -> OutputLengths:
    """What is known after answers of these sizes to requests of these fields."""
    known = OutputLengths()
    for num_tokens in answers:
        known.learn(req(**fields), num_tokens)
    return known


def test_before_anything_is_known_the_median_of_real_traffic():
    assert OutputLengths().predict(req()) == 128


def test_learns_from_answers():
    assert learned(*[500] * 100).predict(req()) == pytest.approx(500, rel=0.02)


def test_one_answer_says_little():
    assert 128 < learned(1000).predict(req()) < 500


def test_groups_of_their_own_are_told_apart():
    known = OutputLengths()
    for _ in range(100):
        known.learn(req(tenant="terse"), 10)
        known.learn(req(tenant="wordy"), 900)
        known.learn(req(model="n"), 300)
    assert known.predict(req(tenant="terse")) == pytest.approx(10, abs=3)
    assert known.predict(req(tenant="wordy")) == pytest.approx(900, rel=0.02)
    assert known.predict(req(model="n")) == pytest.approx(300, rel=0.02)


def test_the_size_of_the_prompt_counts():
    known = OutputLengths()
    for _ in range(100):
        known.learn(req(num_tokens=20), 400)
        known.learn(req(num_tokens=3000), 40)
    assert known.predict(req(num_tokens=25)) > 5 * known.predict(req(num_tokens=2500))


def test_a_new_group_starts_from_the_wider_one():
    known = learned(*[600] * 100, tenant="old")
    assert known.predict(req(tenant="new")) == pytest.approx(600, rel=0.1)


def test_a_change_of_traffic_is_followed():
    known = learned(*[1000] * 2000, *[100] * 1000)
    assert known.predict(req()) == pytest.approx(100, rel=0.25)


def test_the_clients_own_limit_is_not_passed():
    known = learned(*[500] * 100)
    assert known.predict(req(max_output_tokens=16)) == 16
    assert known.predict(req(max_output_tokens=0)) == 1


def test_sequences_share_the_tokens_of_an_answer():
    known = learned(*[900] * 100, num_sequences=3)
    assert known.predict(req(num_sequences=3)) == pytest.approx(300, rel=0.05)


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(output_length, "_MAX_GROUPS", 10)
    known = OutputLengths()
    for number in range(100):
        known.learn(req(tenant=str(number)), 700)
    assert len(known._groups) == 10
    assert known.predict(req(tenant="0")) == pytest.approx(700, rel=0.1)  # the model stays


@given(
    answers=st.lists(st.integers(1, 10_000), max_size=30),
    limit=st.none() | st.integers(0, 1000),
    num_tokens=st.integers(0, 10_000),
)
def test_a_prediction_lies_between_what_was_seen_and_the_prior(answers, limit, num_tokens):
    known = learned(*answers)
    predicted = known.predict(req(num_tokens=num_tokens, max_output_tokens=limit))
    if limit is None:
        assert min([128, *answers]) <= predicted <= max([128, *answers])
    else:
        assert 1 <= predicted <= max(1, limit)


def test_limits_that_make_no_sense_are_the_engines_to_refuse():
    for limit in (0, -1):
        assert OutputLengths().predict(req(max_output_tokens=limit)) == 1


def test_a_mean_follows_answers_within_its_memory_and_keeps_to_the_clients_limit():
    mean = MeanOutputLength(prior_tokens=128.0, memory=50.0)
    assert (mean.predict(None), mean.predict(16)) == (128.0, 16)
    for _ in range(300):
        mean.learn(60, num_sequences=2)
    assert mean.predict(None) == pytest.approx(30.0, rel=0.02)
