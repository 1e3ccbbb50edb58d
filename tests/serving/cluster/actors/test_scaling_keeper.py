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
