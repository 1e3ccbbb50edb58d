"""Engines are emptied before Serve stops them, in Serve's order, and taken back if needed."""

from router.scaling.demand import Demand, EngineRates
from router.scaling.settings import ScalingSettings
from serving.cluster.actors.scaling_keeper import ScalingKeeper

RATES = EngineRates(
    step_base_s=0.01, token_s=1e-4, decode_s=0.0, num_kv_tokens=1 << 30, num_steps=1000
)


class Application:
    """A keeper, a gateway that reports each second, and a Serve that does what it is told."""

    def __init__(self, num_engines=1, **settings):
        options = {"min": 1, "max": 5, "start_s": 10.0, "keep_s": 20.0, "season_s": 0.0} | settings
        self.keeper = ScalingKeeper(ScalingSettings(**options))
        self.now_s = 0.0
        self.engines = [f"e{number}" for number in range(num_engines)]
        self.left = {}
        self.prefill = 0.0
        self.num_requests = 0
        self.target = num_engines
        self.emptying = []
        self.drained = []

    def run(self, duration_s, load, *, stops=True):
        for _ in range(duration_s):
            self.now_s += 1.0
            self.prefill += load * 10_000.0
            self.num_requests += load > 0
            orders = self.keeper.report(
                "g",
                Demand(
                    num_requests_total=self.num_requests,
                    num_prefill_tokens_total=self.prefill,
                    rates=RATES,
                    left_tokens={each: self.left.get(each, 0) for each in self.engines},
                ),
                self.now_s,
                self.drained,
            )
            self.emptying = orders.emptying
            self.target = self.keeper.decide(self.engines, self.target, self.now_s)
            while len(self.engines) < self.target:
                self.engines.append(f"e{int(self.now_s)}-{len(self.engines)}")
            if stops:
                del self.engines[self.target :]  # the newest first


def test_up_and_down():
    """The second engine comes with the work, is emptied when that ends, and stops when empty."""
    app = Application()
    app.run(60, 1.0)
    assert len(app.engines) >= 2
    newest = app.engines[-1]
    app.left = {newest: 40}
    app.run(200, 0.0)
    assert newest in app.emptying  # nothing new, but it has work
    assert newest in app.engines
    app.left = {}
    app.run(10, 0.0)
    assert app.engines == ["e0"]


def test_an_engine_with_work_holds_those_before_it_that_serve_would_stop_first():
    """Serve stops the newest: while that one has work, an older empty one stays, too."""
    app = Application(num_engines=3)
    app.left = {"e2": 10}
    app.run(60, 0.0)
    assert set(app.emptying) == {"e1", "e2"}
    assert app.engines == ["e0", "e1", "e2"]
    app.left = {}
    app.run(5, 0.0)
    assert app.engines == ["e0"]


def test_an_emptying_engine_is_taken_back():
    """When work comes again it costs no start."""
    app = Application(num_engines=2)
    app.left = {"e1": 10}
    app.run(60, 0.0)
    assert app.emptying == ["e1"]
    app.run(60, 0.7)
    assert "e1" not in app.emptying
    assert app.engines[:2] == ["e0", "e1"]


def test_nothing_is_stopped_while_no_gateway_reports():
    """Nobody knows then what engines hold."""
    app = Application(num_engines=2)
    for _ in range(120):
        app.now_s += 1.0
        app.target = app.keeper.decide(app.engines, app.target, app.now_s)
    assert app.target == 2


def test_a_drained_engine_is_no_capacity():
    """Another one is started for its work, as long as it is drained, and then there are two."""
    app = Application(num_engines=1)
    app.run(60, 0.3)
    assert app.engines == ["e0"]
    app.drained = ["e0"]
    app.run(2, 0.3)
    assert len(app.engines) == 2
    assert app.emptying == []
    app.drained = []
    app.run(120, 0.3)
    assert app.engines == ["e0"]


def test_a_drained_engine_takes_one_of_those_that_there_may_be():
    app = Application(num_engines=2, max=2)
    app.drained = ["e0"]
    app.run(60, 3.0)
    assert app.keeper.state.num_wanted == 2
    assert app.target == 3  # which Serve bounds
    assert app.emptying == []


def test_a_drained_engine_is_stopped_only_in_the_way_of_one_that_has_to_stop():
    app = Application(num_engines=1)
    app.drained = ["e0"]
    app.run(200, 0.0)
    assert app.engines[0] == "e0"
    assert len(app.engines) == 2  # min: 1 serves
    app = Application(num_engines=3, keep_s=5.0)
    app.drained = ["e2"]
    app.left = {"e2": 10}
    app.run(20, 0.0)
    assert app.engines == ["e0", "e1", "e2"]  # it has work, and Serve would stop it before e1
    assert app.emptying == ["e1"]
    app.left = {}
    app.run(5, 0.0)
    assert app.engines == ["e0"]


def test_an_engine_that_is_emptied_and_drained_is_not_taken_back():
    app = Application(num_engines=2, keep_s=5.0)
    app.left = {"e1": 10}
    app.run(20, 0.0)
    assert app.emptying == ["e1"]
    app.drained = ["e1"]
    app.run(20, 0.9)
    assert "e1" in app.emptying
    assert len(app.engines) > 2


def test_one_that_is_empty_and_drained_does_not_stand_in_for_one_that_is_wanted():
    """It has nothing left, so Serve may stop it: but not while more are to run than do."""
    app = Application(num_engines=2, keep_s=5.0)
    app.left = {"e1": 10}
    app.run(20, 0.0)
    assert app.emptying == ["e1"]
    app.drained = ["e1"]
    app.left = {}
    app.keeper.use_settings(ScalingSettings(min=2, max=5, season_s=0.0, keep_s=20.0))
    app.run(20, 0.0)
    assert app.engines[:2] == ["e0", "e1"]
    assert len(app.engines) == 3


def test_what_only_one_gateway_says_is_out_of_use_still_serves():
    keeper = ScalingKeeper(ScalingSettings(min=1, max=3))
    keeper.report("g", Demand(), 1.0, ["e0"])
    keeper.report("h", Demand(), 1.0)
    assert keeper.decide(["e0"], 1, 1.0) == 1
    keeper.report("h", Demand(), 1.5, ["e0"])
    assert keeper.decide(["e0"], 1, 2.0) == 2


def test_other_bounds_hold_at_once_and_nothing_is_forgotten():
    app = Application(num_engines=1)
    app.run(60, 2.0)
    load = app.keeper.state.recent_load
    assert len(app.engines) > 3
    app.keeper.use_settings(ScalingSettings(min=1, max=2, season_s=0.0, keep_s=20.0))
    app.run(10, 2.0)
    assert len(app.engines) == 2
    assert app.keeper.state.recent_load == load


def test_an_engine_that_serve_did_not_name_for_a_while_is_no_newer_for_that():
    """It does not while a deployment's options change, and stops the same ones first as before."""
    app = Application(num_engines=2, keep_s=5.0)
    app.left = {"e0": 10, "e1": 10}
    app.run(2, 0.0)
    app.engines = ["e1"]
    app.run(1, 0.0, stops=False)
    app.engines = ["e1", "e0"]
    app.run(20, 0.0)
    assert app.emptying == ["e1"]
