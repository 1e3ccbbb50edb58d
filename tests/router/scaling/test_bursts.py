"""The room for excess is what the share of the work asks for."""

import math
import random

import pytest

from router.scaling.bursts import Bursts
from router.scaling.capacity import engines_for, load_of
from router.scaling.demand import Demand as Seen
from router.scaling.demand import EngineRates, total


@pytest.mark.parametrize("share", [0.8, 0.9, 0.98])
def test_so_much_of_the_work_finds_room(share):
    """Of work that comes from the same law, by weight, to a few hundredths."""
    rng = random.Random(3)
    bursts = Bursts(2000, 4)
    for _ in range(2000):
        bursts.record(rng.lognormvariate(0.0, 0.5), 1.0)
    room = bursts.room(1.0, share)
    later = [rng.lognormvariate(0.0, 0.5) for _ in range(5000)]
    found = sum(each for each in later if each <= room) / sum(later)
    assert found == pytest.approx(share, abs=0.03)


def test_room_grows_with_the_root_of_the_load():
    bursts = Bursts(100, 0)
    for _ in range(100):
        bursts.record(2.0, 1.0)
        bursts.record(0.5, 1.0)
    one, four = bursts.room(1.0, 0.9) - 1.0, bursts.room(4.0, 0.9) - 4.0
    assert four == pytest.approx(2.0 * one)


def test_a_new_level_is_no_excess():
    """What is pending when a jump is found never counts."""
    bursts = Bursts(100, 3)
    for _ in range(100):
        bursts.record(1.0, 1.0)
    before = bursts.room(1.0, 0.98)
    for _ in range(3):
        bursts.record(10.0, 1.0)
    bursts.forget_pending()
    bursts.record(1.0, 1.0)
    assert bursts.room(1.0, 0.98) <= before


RATES = EngineRates(step_base_s=0.01, token_s=1e-4, decode_s=1e-3, num_kv_tokens=10_000)


def test_engines_by_load():
    """4,000 tokens of prefill and 200 of decode: 0.4 and 0.2 of an engine."""
    load = load_of(RATES, 4_000.0, 200.0)
    assert load == pytest.approx(0.6)
    assert engines_for(RATES, load, 200.0, 100.0, 0.6) == pytest.approx(1.0)


def test_engines_by_kv_room():
    """At a load of 0.5 a step takes 20 ms: 200 tokens/s are 4 sequences, here of 8,000 tokens."""
    need = engines_for(RATES, 0.2, 200.0, 8_000.0, 0.5)
    assert need == pytest.approx(4 * 8_000 / (0.8 * 10_000))


def test_gateways_add_up():
    """Of an engine each knows all of its snapshot and its own bookings."""
    other = EngineRates(step_base_s=1, token_s=1, decode_s=1, num_kv_tokens=1, num_steps=9)
    one = Seen(num_requests_total=3, num_held_tokens=5, left_tokens={"a": 7, "b": 0}, rates=RATES)
    two = Seen(num_requests_total=4, num_held_tokens=6, left_tokens={"a": 2, "b": 1}, rates=other)
    both = total([one, two])
    assert (both.num_requests_total, both.num_held_tokens) == (7, 11)
    assert both.left_tokens == {"a": 7, "b": 1}
    assert both.rates is other
    assert math.isclose(total([]).num_prefill_tokens_total, 0.0)
