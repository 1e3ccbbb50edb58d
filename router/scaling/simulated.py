"""How does a simulated fleet grow and shrink? The counterpart of Ray Serve's controller.

An engine is paid for from the time that it is asked for, its start included, until it is gone, its
drain included.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from router.scaling.autoscaler import Autoscaler, ScalingState, emptiest
from router.scaling.demand import Demand, total
from router.simulation.events import World
from router.simulation.node import Node


class Scaler(Protocol):
    """Decides how many engines there should be; called every `interval_s`."""

    interval_s: float
    # What is let go is what holds least, and it is taken back while it drains. Else, as Ray Serve
    # does by itself, the newest is let go, for good.
    chooses: bool

    def num_wanted(self, world: World[Node], num_starting: int) -> int:
        """Return how many engines there should be, starting ones included."""
        ...


@dataclass
class Elasticity:
    """What a run with a scaler has taken, and how it went."""

    engine_s: float = 0.0  # seconds of all engines, from when they were asked for
    num_starts: int = 0
    num_drains: int = 0
    num_recalls: int = 0  # of engines that were draining
    most_engines: int = 0


class ElasticFleet:
    """Starts and drains a simulation's engines as its scaler wants."""

    def __init__(
        self,
        world: World[Node],
        scaler: Scaler,
        start_s: float,
        start_node: Callable[[None], None],
    ) -> None:
        """`start_s`: from asking for an engine until `start_node` makes it, seconds."""
        self.elasticity = Elasticity()
        self._world = world
        self._scaler = scaler
        self._start_s = start_s
        self._start_node = start_node
        self._starting: list[int] = []  # by the number of their start
        self._last_s = world.workload.arrivals[-1].offset_s
        world.call_at(scaler.interval_s, self._scale, None)

    @property
    def num_starting(self) -> int:
        """Engines that were asked for and are not there yet."""
        return len(self._starting)

    def _scale(self, _: None) -> None:
        world, scaler, elasticity = self._world, self._scaler, self.elasticity
        world.call_at(world.now_s + scaler.interval_s, self._scale, None)
        num_paid = len(world.nodes) + len(self._starting)
        if world.now_s <= self._last_s:  # the end of a run is nobody's doing
            elasticity.engine_s += num_paid * scaler.interval_s
            elasticity.most_engines = max(elasticity.most_engines, num_paid)
        working = [node for node in world.nodes.values() if not node.is_draining]
        missing = scaler.num_wanted(world, len(self._starting)) - len(working) - len(self._starting)
        if missing > 0:
            self._add(missing)
        elif missing < 0:
            self._let_go(-missing, working)

    def _add(self, num_engines: int) -> None:
        if self._scaler.chooses:
            for node in [each for each in self._world.nodes.values() if each.is_draining]:
                if num_engines:
                    node.recall()
                    num_engines -= 1
                    self.elasticity.num_recalls += 1
        for _ in range(num_engines):
            self.elasticity.num_starts += 1
            self._starting.append(self.elasticity.num_starts)
            ready_s = self._world.now_s + self._start_s
            self._world.call_at(ready_s, self._finish_start, self.elasticity.num_starts)

    def _finish_start(self, number: int) -> None:
        if number in self._starting:  # else it was given up
            self._starting.remove(number)
            self._start_node(None)

    def _let_go(self, num_engines: int, working: Sequence[Node]) -> None:
        while num_engines and self._starting:
            self._starting.pop()
            num_engines -= 1
        self.elasticity.num_drains += num_engines
        if self._scaler.chooses:
            left = demand_of(self._world).left_tokens
            ids = emptiest({node.id: left.get(node.id, 0) for node in working}, num_engines)
        else:
            ids = [node.id for node in working][::-1][:num_engines]
        for node_id in ids:
            self._world.nodes[node_id].drain()


def demand_of(world: World[Node]) -> Demand:
    """Return what all gateways have seen."""
    return total([gateway.router.demand() for gateway in world.gateways])


class PolicyScaler:
    """The deployed autoscaler, in virtual time."""

    def __init__(self, autoscaler: Autoscaler, interval_s: float = 1.0) -> None:
        self.interval_s = interval_s
        self.chooses = True
        self.autoscaler = autoscaler
        self.states: list[tuple[float, int, ScalingState]] = []  # time, engines, why; each minute

    def num_wanted(self, world: World[Node], num_starting: int) -> int:
        """Return how many engines there should be."""
        num_ready = sum([not node.is_draining for node in world.nodes.values()])
        state = self.autoscaler.decide(
            demand_of(world), num_ready=num_ready, num_starting=num_starting, now_s=world.now_s
        )
        if not self.states or world.now_s - self.states[-1][0] >= 60.0:
            self.states.append((world.now_s, num_ready, state))
        return state.num_wanted
