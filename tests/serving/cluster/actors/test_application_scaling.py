"""Each model has an autoscaler of its own; where they share GPUs, one takes what another gives up.

Ray Serve is played by the test: it starts and stops at once what it is told to.
"""

from router.scaling.demand import Demand, EngineRates
from serving.cluster.actors.application_scaling import ApplicationScaling, Report, ScaledModel

RATES = EngineRates(
    step_base_s=0.01, token_s=1e-4, decode_s=0.0, num_kv_tokens=1 << 30, num_steps=1000
)
QUICK = {"min": 0, "max": 4, "start_s": 2.0, "keep_s": 5.0, "season_s": 0.0, "zero_after_s": 10.0}


class Application:
    """Models `a` and `b`, one gateway, and a Serve that does what it is told."""

    def __init__(self, num_shared_gpus: int = 0, **settings: object) -> None:
        self.scaling = ApplicationScaling()
        self.num_shared_gpus = num_shared_gpus
        self.settings = QUICK | settings
        self.now_s = 0.0
        self.engines: dict[str, list[str]] = {"a": [], "b": []}
        self.work = {"a": 0.0, "b": 0.0}
        self.num_requests = {"a": 0, "b": 0}
        self.most_at_once = 0

    def model(self) -> ScaledModel:
        gpus = 1 if self.num_shared_gpus else 0
        return ScaledModel(
            settings=self.settings, num_gpus=gpus, num_shared_gpus=self.num_shared_gpus
        )

    def run(self, duration_s: int, **load: float) -> None:
        """Let so much come for each model, in engines."""
        for _ in range(duration_s):
            self.now_s += 1.0
            for name, each in load.items():
                self.work[name] += each * 10_000.0
                self.num_requests[name] += each > 0
            demand = {
                name: Demand(
                    num_requests_total=self.num_requests[name],
                    num_prefill_tokens_total=self.work[name],
                    num_open_requests=int(load.get(name, 0.0) > 0),
                    rates=RATES,
                )
                for name in self.engines
            }
            self.scaling.report("g", Report(demand=demand, out_of_use=[]), self.now_s)
            for name, engines in self.engines.items():
                target = self.scaling.decide(name, self.model(), engines, len(engines), self.now_s)
                while len(engines) < min(target, self.settings["max"]):
                    engines.append(f"{name}{self.now_s:.0f}-{len(engines)}")
                del engines[target:]
            self.most_at_once = max(self.most_at_once, sum(self.numbers()))

    def numbers(self) -> tuple[int, int]:
        return len(self.engines.get("a", ())), len(self.engines.get("b", ()))


def test_one_models_traffic_starts_its_own_engines():
    app = Application()
    app.run(60, a=1.2)
    assert app.numbers() == (3, 0)
    app.run(60, b=0.3)
    assert app.numbers() == (0, 1)


def test_what_one_model_gives_up_another_takes():
    app = Application(num_shared_gpus=4)
    app.run(60, a=3.0)
    assert app.numbers() == (4, 0)
    app.run(60, a=3.0, b=3.0)  # who is asked for gets an engine, and no more while a needs the rest
    assert app.numbers() == (3, 1)
    app.run(60, b=3.0)
    assert app.numbers() == (0, 4)
    assert app.most_at_once <= 4


def test_what_has_been_removed_leaves_its_gpus():
    app = Application(num_shared_gpus=4)
    app.run(60, a=3.0)
    del app.engines["a"]
    app.run(60, b=3.0)
    assert len(app.engines["b"]) == 4


def test_a_model_that_serve_has_not_asked_for_yet_has_no_orders():
    scaling = ApplicationScaling()
    report = Report(demand={"a": Demand()}, out_of_use=[])
    assert scaling.report("g", report, 1.0) == {}
    scaling.decide("a", ScaledModel(settings=QUICK), [], 0, 1.0)
    assert list(scaling.report("g", report, 2.0)) == ["a"]
