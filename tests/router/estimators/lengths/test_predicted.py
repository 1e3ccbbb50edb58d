"""Forecasts: the text first, then what its group answered; distributions, limits, restarts."""

import math
import random

import msgspec
import pytest

from router.estimators.lengths.distribution import LEVELS
from router.estimators.lengths.forecast import num_more_tokens
from router.estimators.lengths.predicted import LearnedLengths, PredictedLengths
from router.estimators.lengths.text_model import TextModel
from router.types import Request

SHORT, LONG = (1,), (2,)


def make_lengths():
    weights = [0.0] * 12
    weights[1], weights[2] = -1.5, 1.5
    return PredictedLengths(TextModel(weights, num_meanings=8))


def ask(wording=(), **fields):
    fields = {"id": "r", "model": "m", "num_prompt_tokens": 20} | fields
    return Request(wording=wording, **fields)


def test_before_any_answer_the_wording_tells_long_from_short():
    lengths = make_lengths()
    short, long = lengths.forecast(ask(SHORT)), lengths.forecast(ask(LONG))
    assert 3 * short.num_booked_tokens < long.num_booked_tokens
    assert 3 * short.num_expected_tokens < long.num_expected_tokens
    assert long.quantiles == tuple(sorted(long.quantiles))
    assert len(long.quantiles) == len(LEVELS)


def test_a_system_prompt_whose_answers_are_all_alike_counts_more_than_the_wording():
    lengths = make_lengths()
    rng = random.Random(4)
    for _ in range(60):
        wording = rng.choice((SHORT, LONG))
        lengths.learn(ask(wording, system_prompt=7), 12)
    there = lengths.forecast(ask(LONG, system_prompt=7))
    assert there.num_expected_tokens < 20
    assert there.quantiles[-1] < 40


def test_no_forecast_is_beyond_the_clients_own_limit():
    lengths = make_lengths()
    found = lengths.forecast(ask(LONG, max_output_tokens=50))
    assert max(found.num_expected_tokens, found.num_booked_tokens, *found.quantiles) <= 50
    assert 0.5 < found.cut_share <= 1.0
    assert lengths.forecast(ask(SHORT, max_output_tokens=10_000)).cut_share == 0.0


def test_answers_cut_at_the_limit_are_taken_to_have_been_longer():
    lengths = make_lengths()
    for _ in range(200):
        lengths.learn(ask(max_output_tokens=100), 100)
    assert lengths.forecast(ask()).quantiles[3] > 110
    assert lengths.forecast(ask(max_output_tokens=100)).cut_share > 0.8


def test_a_change_of_traffic_is_followed():
    lengths = make_lengths()
    for length in [400] * 300 + [30] * 300:
        lengths.learn(ask(), length)
    assert lengths.forecast(ask()).num_expected_tokens < 90


def test_several_sequences_count_each():
    lengths = make_lengths()
    for _ in range(100):
        lengths.learn(ask(num_sequences=4), 4 * 50)
    assert lengths.forecast(ask(num_sequences=4)).num_expected_tokens == pytest.approx(50, rel=0.3)


def test_what_was_learned_outlives_a_restart():
    lengths, other = make_lengths(), make_lengths()
    for number in range(150):
        lengths.learn(ask(LONG if number % 2 else SHORT, tenant="t", system_prompt=5), 40)
    data = msgspec.msgpack.encode(lengths.state())
    other.restore(msgspec.msgpack.decode(data, type=LearnedLengths))
    for request in (ask(LONG, tenant="t", system_prompt=5), ask(SHORT), ask(tenant="u")):
        assert other.forecast(request) == lengths.forecast(request)
    assert other.coverage() == lengths.coverage()


def test_what_belongs_to_other_weights_is_not_taken_in():
    lengths, other = make_lengths(), PredictedLengths(TextModel([0.0] * 5, num_meanings=2))
    for _ in range(50):
        lengths.learn(ask(), 7)
    other.restore(lengths.state())
    assert other.forecast(ask()).num_expected_tokens > 60


def test_the_80_percent_interval_holds_what_it_says_from_the_first_answers_on():
    lengths = make_lengths()
    rng = random.Random(5)
    inside = []
    for _ in range(800):
        wording, middle = rng.choice(((SHORT, 3.0), (LONG, 6.0), ((), 4.5)))
        length = max(1, round(math.exp(rng.gauss(middle, 0.6))))
        quantiles = lengths.forecast(ask(wording)).quantiles
        inside.append(quantiles[1] <= length <= quantiles[5])
        lengths.learn(ask(wording), length)
    for start in range(0, 800, 200):
        assert 0.7 <= sum(inside[start : start + 200]) / 200 <= 0.9
    assert 0.75 <= sum(inside) / 800 <= 0.85


def test_what_is_to_come_is_refined_while_it_decodes():
    quantiles = (10, 30, 60, 100, 170, 330, 900)
    more = [num_more_tokens(150, quantiles, come) for come in (0, 60, 170, 330)]
    assert more[0] == pytest.approx(100, abs=2)  # the median
    assert more[1] < more[0]
    assert more[3] > more[2] > more[1]  # who has come so far, has a long way to go
    assert [num_more_tokens(150, (), come) for come in (0, 100, 500)] == [150, 50, 0]
