"""Engines come before the work does, stay while it may come back, and go when it does not."""

import math
import random

import pytest

from router.scaling.autoscaler import BIN_S, Autoscaler, emptiest
from router.scaling.demand import Demand, EngineRates
from router.scaling.settings import ScalingSettings

# An engine of these does 10,000 tokens of prefill per second and nothing else.
RATES = EngineRates(
    step_base_s=0.01, token_s=1e-4, decode_s=0.0, num_kv_tokens=1 << 30, num_steps=1000
)


class World:
    """Seconds of one model: tokens come, engines start and stop at once when told to."""

    def __init__(self, start_s=20.0, num_ready=1, **settings):
        self.start_s = start_s
        options = {"min": 1, "max": 50, "start_s": start_s, "season_s": 0.0} | settings
        self.autoscaler = Autoscaler(ScalingSettings(**options))
        self.now_s = 0.0
        self.num_ready = num_ready
        self.ready_s = []  # of those that are starting
        self.prefill = 0.0
        self.num_requests = 0
        self.num_held_tokens = 0

    def run(self, duration_s, load):
        """Let so much work come per second, in engines. Return the engines after each second."""
        seen = []
        for _ in range(round(duration_s)):
            self.now_s += 1.0
            come = load(self.now_s) if callable(load) else load
            self.prefill += come * 10_000.0
            self.num_requests += bool(come)
            while self.ready_s and self.ready_s[0] <= self.now_s:
                self.ready_s.pop(0)
                self.num_ready += 1
            state = self.autoscaler.decide(
                Demand(
                    num_requests_total=self.num_requests,
                    num_prefill_tokens_total=self.prefill,
                    num_held_tokens=self.num_held_tokens,
                    num_held_requests=bool(self.num_held_tokens),
                    num_open_requests=bool(self.num_held_tokens),
                    rates=RATES,
                ),
                num_ready=self.num_ready,
                num_starting=len(self.ready_s),
                now_s=self.now_s,
            )
            missing = state.num_wanted - self.num_ready - len(self.ready_s)
            self.ready_s += [self.now_s + self.start_s] * missing
            while missing < 0 and self.ready_s:
                self.ready_s.pop()
                missing += 1
            self.num_ready += min(0, missing)
            seen.append(self.num_ready)
        return seen


def test_steady_work_gets_what_it_needs():
    """Two engines' work at a load of 0.6 each: four, and some room for what may exceed it."""
    world = World()
    assert world.run(1800, 2.0)[-1] in (4, 5)
    assert world.autoscaler.state.expected_load == pytest.approx(2.0, rel=0.01)


def test_uneven_work_gets_more_room():
    """Of the same mean: what exceeded forecasts is provided for."""
    rng = random.Random(1)
    even, uneven = World(), World()
    even.run(3600, 2.0)
    bursts = [rng.choice((0.2, 0.2, 0.2, 7.4)) for _ in range(400)]
    uneven.run(3600, lambda now_s: bursts[int(now_s / 10.0)])
    assert uneven.num_ready > 2 * even.num_ready


def test_rising_work_is_met_before_it_is_there():
    """Its trend is followed as far ahead as a start takes: no more comes than engines do.

    Once a forecast so far ahead could be compared with what came, that is.
    """
    world = World(start_s=120.0)
    world.run(600, 1.0)

    def rise(now_s):
        return 1.0 + (now_s - 600.0) / 150.0

    seen = world.run(1500, rise)
    late = [second for second, ready in enumerate(seen) if ready < rise(601.0 + second)]
    assert all(second < 2 * 120 for second in late)
    assert world.autoscaler.state.forecast == "trend"


def test_a_season_is_known_the_second_time():
    """The rise comes at the same time of each period: engines are there when it begins.

    To 20 s, as finely as a part of the period is told from the next.
    """
    world = World(start_s=120.0, season_s=3600.0)

    def step(now_s):
        return 6.0 if 1800.0 <= now_s % 3600.0 < 3000.0 else 1.0

    world.run(2 * 3600 + 1820, step)
    assert world.num_ready >= 10
    first = World(start_s=120.0, season_s=3600.0)
    first.run(1820, step)
    assert first.num_ready <= 3


def test_a_spike_is_answered_within_seconds():
    """Ten times the work: what it needs is asked for after two bins, and let go afterwards."""
    world = World(start_s=60.0)
    world.run(1200, 1.0)
    world.run(3 * BIN_S, 10.0)
    assert world.num_ready + len(world.ready_s) >= 16
    world.run(300, 10.0)
    assert world.num_ready >= 17
    world.run(900, 1.0)
    assert world.num_ready <= 4


def test_an_engine_is_kept_as_long_as_one_takes_to_start():
    """Pauses shorter than that let nothing go."""
    world = World(start_s=300.0)
    world.run(1200, 3.0)
    before = world.num_ready
    assert min(world.run(250, 0.0)) == before
    assert min(world.run(1200, 0.0)) == 1


def test_zero_and_back():
    """Without a request for long, none; with the first one that is held, one."""
    world = World(min=0, zero_after_s=120.0, start_s=30.0)
    world.run(600, 0.5)
    assert world.run(100, 0.0)[-1] >= 1
    assert world.run(600, 0.0)[-1] == 0
    world.num_held_tokens = 100
    world.run(1, 0.0)
    assert len(world.ready_s) == 1


def test_held_work_asks_for_engines():
    """What those that are there cannot do until another one is ready is for the latter."""
    idle, late = World(start_s=10.0), World(start_s=10.0)
    idle.run(300, 0.5)
    late.run(300, 0.5)
    late.num_held_tokens = 10_000 * 400  # 400 s of an engine
    late.run(1, 0.5)
    assert late.autoscaler.state.num_wanted > idle.autoscaler.state.num_wanted + 1


def test_bounds():
    """Never fewer than min, never more than max."""
    world = World(min=2, max=3, num_ready=2)
    assert set(world.run(600, 0.0)) == {2}
    assert max(world.run(600, 30.0)) == 3
    with pytest.raises(ValueError, match="more than max allows"):
        ScalingSettings(min=3, max=2)
    with pytest.raises(ValueError, match="not between min and max"):
        ScalingSettings(min=1, max=2, initial=3)


def test_what_was_started_with_stays_while_nothing_is_known():
    world = World(num_ready=7, start_s=60.0)
    assert min(world.run(55, 0.0)) == 7


def test_the_start_time_is_measured():
    """The guess counts until the first engine is ready; then the longest of the last starts."""
    world = World(start_s=90.0)
    world.autoscaler = Autoscaler(ScalingSettings(min=1, max=9, start_s=10.0, season_s=0.0))
    world.run(60, 2.0)
    assert world.autoscaler.state.start_s == 10.0
    world.run(300, 2.0)
    assert world.autoscaler.state.start_s == pytest.approx(90.0, abs=2.0)


def test_a_gateway_that_is_replaced_is_no_negative_demand():
    """Its totals begin at nothing again."""
    world = World()
    world.run(300, 2.0)
    world.prefill = world.num_requests = 0
    world.run(60, 2.0)
    assert math.isclose(world.autoscaler.state.expected_load, 2.0, rel_tol=0.2)


def test_the_emptiest_go():
    """Of equals the last."""
    assert emptiest({"a": 5, "b": 0, "c": 0, "d": 9}, 3) == ["c", "b", "a"]
    assert emptiest({"a": 5}, 0) == []
