"""Of few answers all are learned from, of many some, whichever they are."""

import random

import pytest

from router.estimators.lengths.learning_share import MAX_PER_S, LearningShare
from tests.router.estimators.lengths.test_predicted import ask, make_lengths


def learned(per_s, span_s, start_s=0.0, share=None):
    """How many of so many a second are learned from, after a second to find out."""
    share, rng = share or LearningShare(), random.Random(3)
    ids = [f"{rng.getrandbits(128):032x}" for _ in range(round(per_s * (1.0 + span_s)))]
    taken = [share.has(each, start_s + number / per_s) for number, each in enumerate(ids)]
    return sum(taken[round(per_s) + 1 :])


@pytest.mark.parametrize("per_s", [0.1, 5, 45])
def test_of_few_all(per_s):
    span_s = 100 / per_s
    assert learned(per_s, span_s) == round(per_s * (1.0 + span_s)) - round(per_s) - 1


@pytest.mark.parametrize("per_s", [200, 2000])
def test_of_many_about_as_many_as_of_few(per_s):
    assert learned(per_s, 10.0) == pytest.approx(10 * MAX_PER_S, rel=0.2)


def test_when_they_become_few_all_again():
    share = LearningShare()
    learned(1000, 3.0, share=share)
    share.has("first of the next second", 10.0)
    assert learned(10, 5.0, start_s=11.0, share=share) == 49


def test_a_group_that_is_hardly_known_is_learned_from_whatever_the_rate():
    lengths, rng = make_lengths(), random.Random(9)
    taken = {"large": 0, "small": 0}
    for number in range(20_000):  # in ten seconds
        tenant = "small" if number % 200 == 0 else "large"
        request = ask(id=f"{rng.getrandbits(128):032x}", tenant=tenant)
        if lengths.wants(request, number / 2000):
            taken[tenant] += 1
            lengths.learn(request, 50)
    assert taken["small"] >= 50  # of 100
    assert taken["large"] < 2000 + 12 * MAX_PER_S  # all of the first second


def test_the_interval_holds_what_it_says_of_those_that_are_not_learned_from():
    lengths, rng, inside = make_lengths(), random.Random(2), []
    for number in range(6000):
        request = ask(id=f"{rng.getrandbits(128):032x}")
        length = max(1, round(rng.lognormvariate(4.5, 0.7)))
        quantiles = lengths.forecast(request).quantiles
        inside.append(quantiles[1] <= length <= quantiles[5])
        if lengths.wants(request, number / 600):
            lengths.learn(request, length)
    assert 0.75 <= sum(inside[1000:]) / 5000 <= 0.85
