r"""How many engines of a model should Ray Serve run, and which of them get no new work?

Serve stops engines by an order of its own, on one node the newest first. So an engine is emptied
before Serve hears of it:

    serving --more than are wanted--> emptying --nothing left in it--> released: Serve stops it
       ^                                 |
       \------wanted after all-----------/

Gateways send an emptying engine no new work. None is stopped that holds any, so none is aborted;
and one that is still there costs no start.

An engine that is out of use, because an admin drained it or its hardware has a fault, is no
capacity: another one is wanted in its place. It is kept, unless it is newer than one that is to
stop, for Serve stops it before that one. No clock and no Ray here: times are arguments.
"""

from collections.abc import Callable, Collection

import msgspec

from router.scaling.autoscaler import Autoscaler, ScalingState
from router.scaling.demand import Demand, total
from router.scaling.settings import ScalingSettings

# A gateway that reports no more has gone: what it held went with it.
_STALE_S = 5.0
# What was sent before the order to empty an engine has arrived, and been reported, by then.
_SETTLED_S = 2.5
# Serve does not name an engine while its options change, and then again: it is no newer for that.
_AWAY_S = 60.0


class Orders(msgspec.Struct, frozen=True, kw_only=True):
    """What gateways are told."""

    emptying: list[str] = []  # ids of engines that get no new work
    wanted: ScalingState = ScalingState()  # how many, and why
    num_running: int = 0
    ready_in_s: float | None = None  # until the next one should be ready; None: none starts


class _Report(msgspec.Struct):
    demand: Demand
    out_of_use: frozenset[str]
    received_s: float


class ScalingKeeper:
    """Hears what all gateways have seen, and how many engines run; says how many should."""

    def __init__(self, settings: ScalingSettings) -> None:
        self.autoscaler = Autoscaler(settings)
        self._reports: dict[str, _Report] = {}  # by gateway; the totals of gone ones stay
        self._emptying: dict[str, float] = {}  # since when, by engine, oldest first
        self._seen_s: dict[str, float] = {}  # when, by engine, in the order in which they came
        self._order: dict[str, None] = {}  # of these, those that run
        self._out: set[str] = set()  # of these, those out of use that are not emptied anyhow
        self._orders = Orders()

    def use_settings(self, settings: ScalingSettings) -> None:
        """Go by these from now on. What has been learned stays, unless seasons are others."""
        if settings.season_s != self.autoscaler.settings.season_s:
            self.autoscaler = Autoscaler(settings)
        self.autoscaler.settings = settings

    def report(
        self, gateway_id: str, demand: Demand, now_s: float, out_of_use: Collection[str] = ()
    ) -> Orders:
        """Take in what a gateway has seen; return what it is told.

        It sends nothing new to engines `out_of_use`, whatever it is told here.
        """
        self._reports[gateway_id] = _Report(demand, frozenset(out_of_use), now_s)
        ready_s = self.autoscaler.start_times.next_ready_s
        ready_in_s = None if ready_s is None else max(0.0, ready_s - now_s)
        return msgspec.structs.replace(self._orders, ready_in_s=ready_in_s)

    def decide(
        self,
        running: list[str],
        num_target: int,
        now_s: float,
        granted: Callable[[int, int], int] | None = None,
    ) -> int:
        """Return how many engines Serve should run.

        `running`: the ids of those that do. `num_target`: what was returned last, as Serve has it.
        `granted` returns how many the model may have of so many that it wants, and has.
        """
        self._seen_s |= dict.fromkeys(running, now_s)
        self._seen_s = {each: at for each, at in self._seen_s.items() if now_s - at < _AWAY_S}
        self._order = dict.fromkeys(each for each in self._seen_s if each in running)
        self._emptying = {each: at for each, at in self._emptying.items() if each in running}
        heard = [each for each in self._reports.values() if now_s - each.received_s <= _STALE_S]
        drained = frozenset.intersection(*[each.out_of_use for each in heard]) if heard else set()
        self._out = {each for each in running if each in drained and each not in self._emptying}
        demand = self._demand(now_s)
        num_starting = max(0, num_target - len(running))
        state = self.autoscaler.decide(
            demand, num_ready=self._num_serving, num_starting=num_starting, now_s=now_s
        )
        if granted is not None:
            num = granted(state.num_wanted, self._num_serving + num_starting)
            state = msgspec.structs.replace(state, num_wanted=num)
        self._mark(state.num_wanted, drained, now_s)
        # While others are to start Serve stops none, and would start fewer for one released.
        is_lacking = self._num_serving < state.num_wanted
        num_released = self._num_released(demand, now_s) if heard and not is_lacking else 0
        self._orders = Orders(
            emptying=list(self._emptying),
            wanted=state,
            num_running=len(running),
        )
        num_others = len(running) - self._num_serving
        return max(state.num_wanted, self._num_serving) + num_others - num_released

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

    @property
    def _num_serving(self) -> int:
        return len(self._order) - len(self._emptying) - len(self._out)

    def _mark(self, num_wanted: int, drained: Collection[str], now_s: float) -> None:
        """Empty the newest of what is too much, or take back what is not."""
        idle = self._emptying.keys() | self._out
        serving = [each for each in self._order if each not in idle]
        while len(serving) > num_wanted:
            self._emptying[serving.pop()] = now_s
        # The oldest of them: Serve would stop it last.
        usable = [each for each in self._order if each in self._emptying and each not in drained]
        for engine in usable[: max(0, num_wanted - len(serving))]:
            self._emptying.pop(engine)

    def _num_released(self, demand: Demand, now_s: float) -> int:
        """Return how many of the newest engines, in a row, are empty and stay so."""
        num_released = num_in_the_way = 0
        for engine in reversed(self._order):
            if demand.left_tokens.get(engine, 0) > 0:
                break
            if engine in self._out:
                num_in_the_way += 1
                continue
            if now_s - self._emptying.get(engine, now_s) < _SETTLED_S:
                break
            num_released += 1 + num_in_the_way
            num_in_the_way = 0
        return num_released
