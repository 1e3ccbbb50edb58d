r"""How many engines should Ray Serve run, and which of them get no new work? Of one application.

Serve stops engines by an order of its own, on one node the newest first. So an engine is emptied
before Serve hears of it:

    serving --more than are wanted--> emptying --nothing left in it--> released: Serve stops it
       ^                                 |
       \------wanted after all-----------/

Gateways send an emptying engine no new work. None is stopped that holds any, so none is aborted;
and one that is still there costs no start. No clock and no Ray here: times are arguments.
"""

import msgspec

from router.scaling.autoscaler import Autoscaler, ScalingState
from router.scaling.demand import Demand, total
from router.scaling.settings import ScalingSettings

# A gateway that reports no more has gone: what it held went with it.
_STALE_S = 5.0
# What was sent before the order to empty an engine has arrived, and been reported, by then.
_SETTLED_S = 2.5


class Orders(msgspec.Struct, frozen=True, kw_only=True):
    """What gateways are told."""

    emptying: list[str] = []  # ids of engines that get no new work
    wanted: ScalingState = ScalingState()  # how many, and why
    num_running: int = 0
    ready_in_s: float | None = None  # until the next one should be ready; None: none starts


class _Report(msgspec.Struct):
    demand: Demand
    received_s: float


class ScalingKeeper:
    """Hears what all gateways have seen, and how many engines run; says how many should."""

    def __init__(self, settings: ScalingSettings) -> None:
        self.autoscaler = Autoscaler(settings)
        self._reports: dict[str, _Report] = {}  # by gateway; the totals of gone ones stay
        self._emptying: dict[str, float] = {}  # since when, by engine, oldest first
        self._order: dict[str, None] = {}  # engines as they came
        self._orders = Orders()
        self.last_call_s = 0.0

    def report(self, gateway_id: str, demand: Demand, now_s: float) -> Orders:
        """Take in what a gateway has seen; return what it is told."""
        self._reports[gateway_id] = _Report(demand, now_s)
        ready_s = self.autoscaler.start_times.next_ready_s
        ready_in_s = None if ready_s is None else max(0.0, ready_s - now_s)
        return msgspec.structs.replace(self._orders, ready_in_s=ready_in_s)

    def decide(self, running: list[str], num_target: int, now_s: float) -> int:
        """Return how many engines Serve should run.

        `running`: the ids of those that do. `num_target`: what was returned last, as Serve has it.
        """
        self.last_call_s = now_s
        self._order = {each: None for each in self._order if each in running}
        self._order |= dict.fromkeys(running)
        self._emptying = {each: at for each, at in self._emptying.items() if each in running}
        demand = self._demand(now_s)
        num_ready = len(running) - len(self._emptying)
        state = self.autoscaler.decide(
            demand,
            num_ready=num_ready,
            num_starting=max(0, num_target - len(running)),
            now_s=now_s,
        )
        self._mark(state.num_wanted, now_s)
        num_released = self._num_released(demand, now_s)
        num_ready = len(running) - len(self._emptying)
        self._orders = Orders(
            emptying=list(self._emptying),
            wanted=state,
            num_running=len(running),
        )
        return max(state.num_wanted, num_ready) + len(self._emptying) - num_released

    @property
    def state(self) -> ScalingState:
        """How many engines there should be, and why."""
        return self.autoscaler.state

    def _demand(self, now_s: float) -> Demand:
        fresh = []
        for report in self._reports.values():
            if now_s - report.received_s <= _STALE_S:
                fresh.append(report.demand)
            else:
                demand = report.demand
                fresh.append(
                    Demand(
                        num_requests_total=demand.num_requests_total,
                        num_prefill_tokens_total=demand.num_prefill_tokens_total,
                        num_decode_tokens_total=demand.num_decode_tokens_total,
                    )
                )
        return total(fresh)

    def _mark(self, num_wanted: int, now_s: float) -> None:
        """Empty the newest of what is too much, or take back what is not."""
        serving = [each for each in self._order if each not in self._emptying]
        while len(serving) > num_wanted:
            self._emptying[serving.pop()] = now_s
        for _ in range(min(num_wanted - len(serving), len(self._emptying))):
            # The oldest of them: Serve would stop it last.
            self._emptying.pop(next(each for each in self._order if each in self._emptying))

    def _num_released(self, demand: Demand, now_s: float) -> int:
        """Return how many of the newest engines, in a row, are empty and stay so."""
        num_released = 0
        heard = [each for each in self._reports.values() if now_s - each.received_s <= _STALE_S]
        for engine in reversed(self._order):
            since_s = self._emptying.get(engine)
            if since_s is None or now_s - since_s < _SETTLED_S:
                break
            if not heard or demand.left_tokens.get(engine, 0) > 0:
                break
            num_released += 1
        return num_released
