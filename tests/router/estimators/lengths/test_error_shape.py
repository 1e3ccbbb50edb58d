"""The distribution of errors: calibrated whatever they are like, cut-off answers included."""

import random

import pytest

from router.estimators.lengths.error_shape import NUM_PARTS, ErrorShape


def at(shape, level):
    return shape.quantiles().at(level)


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.5])
def test_the_interval_holds_four_of_five_whatever_the_scale(scale):
    rng = random.Random(1)
    shape, inside = ErrorShape(), []
    for _ in range(1500):
        error = scale * rng.gauss(0.0, 1.0)
        inside.append(at(shape, 0.1) <= error <= at(shape, 0.9))
        shape.learn(error, is_cut=False)
    assert 0.77 <= sum(inside) / len(inside) <= 0.83
    assert 0.75 <= sum(inside[-400:]) / 400 <= 0.85
    assert shape.coverage == pytest.approx(0.8, abs=0.08)


def test_after_a_change_of_traffic_the_interval_comes_right_again():
    rng = random.Random(2)
    shape, inside = ErrorShape(), []
    for number in range(2000):
        error = (0.4 if number < 1000 else 1.6) * rng.gauss(0.0, 1.0)
        inside.append(at(shape, 0.1) <= error <= at(shape, 0.9))
        shape.learn(error, is_cut=False)
    assert 0.7 <= sum(inside[1100:1300]) / 200 <= 0.9
    assert 0.75 <= sum(inside[-500:]) / 500 <= 0.85


def test_answers_that_were_cut_off_do_not_make_long_ones_look_rare():
    """With every answer above 0.5 cut there, the upper half is still taken to be above it."""
    rng = random.Random(3)
    shape, naive = ErrorShape(), ErrorShape()
    for _ in range(1500):
        error = rng.gauss(0.0, 1.0)
        shape.learn(min(error, 0.5), is_cut=error > 0.5)
        naive.learn(min(error, 0.5), is_cut=False)
    assert at(shape, 0.9) > 0.8
    assert at(naive, 0.9) < 0.6
    assert shape.mean_above(0.5) > 0.8


def test_quantiles_ascend():
    shape = ErrorShape()
    for error in (5.0, 5.0, -7.0, 9.0):
        shape.learn(error, is_cut=False)
    parts = shape.quantiles().parts()
    assert parts == sorted(parts)
    assert len(parts) == NUM_PARTS
    assert parts[15] < shape.quantiles().booked() < parts[16]
