"""The deployed router in virtual time: an event heap around `router.core.router.Router`.

What `serving` is in real time: gateways that carry out decisions as `serving.gateway.driver` does,
engines whose replicas push snapshots as `serving.stream.server` does, and a network between them.
No logic of the router is here. Equal seeds give equal runs, event by event. What is kept out of
the heap is in `router.simulation.node`.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop
from typing import Any

from router import Request, RouterSettings
from router.providers.settings import FallbackSettings
from router.scaling.simulated import ElasticFleet, Scaler
from router.scheduling.policies import POLICIES
from router.simulation.events import NeedsSnapshots, Network, Receiver, World
from router.simulation.gateway import Gateway
from router.simulation.journal import Run
from router.simulation.node import Engine, Node
from router.simulation.provider import ProviderModel
from router.simulation.workload.workload import Arrival, Workload
from router.types import HEARTBEAT_S

# Up to so many engines `headway` looks at all of them. Of more it draws from those that accept
# work, in the order in which they began to, and that has to be told as it happens.
_MAX_CALM_ENGINES = 64


@dataclass(frozen=True)
class Failure:
    """An engine fails, its jobs are lost, and another replaces it."""

    engine: int
    at_s: float
    down_s: float  # until its replacement is ready


class Simulation(World[Node]):
    """One run of a workload over engines and gateways."""

    def __init__(
        self,
        workload: Workload,
        settings: RouterSettings,
        make_engine: Callable[[random.Random], Engine],
        num_engines: int,
        *,
        num_gateways: int = 1,
        network: Network | None = None,
        failures: Sequence[Failure] = (),
        scaler: Scaler | None = None,
        segment_tokens: int = 16,
        contention: float = 0.0,
        start_s: float = 0.0,
        seed: int = 0,
        priority: Callable[[Arrival], int] | None = None,
        providers: Sequence[ProviderModel] = (),
        fallback: FallbackSettings | None = None,
        on_progress: Callable[[int], None] | None = None,
        eager: bool = False,
        reports: bool = True,
    ) -> None:
        """Set up engines and gateways; `run` starts the run.

        `segment_tokens`: tokens that one hash of a job covers, as the engines expect it.
        `contention`: how much longer a step takes, as a share of it, while all other engines
        step too (engines that share a machine's memory; GPUs do not).
        `start_s`: from the time that `scaler` asks for an engine until it is ready, seconds.
        `priority`: replaces the priority that the gateway would give the engine (for a reference
        that knows more than a gateway can).
        `on_progress`: called with the number of arrivals so far.
        `eager`: every step and every snapshot is an event of its own: the same run, slower.
        `reports`: engines send snapshots of their changes. Without them, heartbeats alone: a
        fraction of the time, for policies that do not read what engines report
        (`can_do_without_snapshots`). The same run, or `NeedsSnapshots` is raised by `run`.
        """
        super().__init__(
            workload,
            network if network is not None else Network(),
            segment_tokens=segment_tokens,
            contention=contention,
            eager=eager,
            reports=reports,
        )
        if not reports:
            settings = _judging_early(settings)
        self._num_arrived = 0
        self._num_nodes = 0
        self._seed = seed
        self.num_listening = num_gateways if self.always_listens else 0
        disturbances = (*failures, *providers, scaler, settings.hedge_factor)
        self.is_calm = (
            not self.always_listens
            and num_engines <= _MAX_CALM_ENGINES
            and not any(each is not None for each in disturbances)
        )
        self.slow_step_s = _slow_step_s(settings)
        self._make_engine = make_engine
        self._priority = priority
        self._on_progress = on_progress
        self.providers = {provider.settings.name: provider for provider in providers}
        self._gateways = [
            Gateway(self, settings.model_copy(update={"seed": settings.seed + number}), number)
            for number in range(num_gateways)
        ]
        self.gateways = self._gateways
        for gateway in self.gateways if providers else ():
            settings_of = [provider.settings for provider in providers]
            gateway.router.providers.use(settings_of, fallback or FallbackSettings(), 0.0)
        rng = random.Random(f"simulation {seed}")
        self._gateway_of = [rng.randrange(num_gateways) for _ in workload.arrivals]
        for _ in range(num_engines):
            self._start_node(None)
        for failure in failures:
            self.call_at(failure.at_s, self._fail, failure)
        self.elastic: ElasticFleet | None = None
        if scaler is not None:
            self.elastic = ElasticFleet(self, scaler, start_s, self._start_node)

    def run(self) -> Run:
        """Run until every request has ended; return what became of them.

        Raises `NeedsSnapshots` if it runs without them and they could have changed a decision.
        """
        self.call_at(self.workload.arrivals[0].offset_s, self._arrive, 0)
        heap, num_requests = self.heap, len(self.workload)
        while self._num_arrived < num_requests or self.num_open:
            self.now_s, _, act, argument = heappop(heap)
            act(argument)
        if not self.reports:
            self._check_breakers()
        self.journal.num_events = self.num_events
        self.journal.num_preemptions += sum(node.num_preemptions for node in self.nodes.values())
        return self.journal.to_run()

    def on_slow_step(self) -> None:
        """Note that a step takes so long that a router may judge its engine by it."""
        if not self.reports:
            raise NeedsSnapshots
        self.is_calm = False

    def _check_breakers(self) -> None:
        """Raise `NeedsSnapshots` if a breaker has opened that judges by what was predicted."""
        for gateway in self.gateways:
            if gateway.router.state(self.now_s).breaker_events:
                raise NeedsSnapshots

    @property
    def working_nodes(self) -> list[Node]:
        """Engines that accept new jobs."""
        return [node for node in self.nodes.values() if not node.is_draining]

    def priority_of(self, gateway: Receiver[Node], request: Request, arrival: Arrival) -> int:
        """Return the priority that the engine gets, as vLLM's: lower is first."""
        if self._priority is not None:
            return self._priority(arrival)
        ttft_deadline_s = gateway.router.discipline.engine_priority_s(request)
        return 0 if ttft_deadline_s is None else round(ttft_deadline_s * 1000)

    def _arrive(self, number: int) -> None:
        self._num_arrived = number + 1
        self.num_open += 1
        self.journal.record_arrival(number)
        if self._num_arrived < len(self.workload):
            next_s = self.workload.arrivals[self._num_arrived].offset_s
            self.call_at(next_s, self._arrive, self._num_arrived)
        if self._on_progress is not None and not number % 1000:
            self._on_progress(number)
        self._gateways[self._gateway_of[number]].on_arrival(number)

    def _start_node(self, _: Any) -> None:
        name = f"engine-{self._num_nodes:04}"
        # Each node has its own: how far it runs ahead of the others then changes nothing.
        engine_rng, node_rng = (
            random.Random(f"{part} {self._seed} {name}") for part in ("engine", "snapshots")
        )
        node = Node(self, name, self._make_engine(engine_rng), node_rng)
        self._num_nodes += 1
        self.nodes[node.id] = node
        for gateway in self._gateways:
            gateway.on_replica_up(node)
        node.push_snapshot(self.now_s)
        self.call_at(self.now_s + HEARTBEAT_S, node.send_heartbeat, None)

    def _fail(self, failure: Failure) -> None:
        working = self.working_nodes
        if failure.engine < len(working):
            self.remove_node(working[failure.engine])
        self.call_at(self.now_s + failure.down_s, self._start_node, None)

    def remove_node(self, node: Node) -> None:
        """Remove an engine at once; the jobs in it are lost."""
        for gateway in self._gateways:
            gateway.deliver_snapshots()
        del self.nodes[node.id]
        node.stop()
        self.journal.num_preemptions += node.num_preemptions
        for gateway in self._gateways:
            gateway.on_replica_down(node)


def can_do_without_snapshots(settings: RouterSettings) -> bool:
    """Whether a run without failures may come to its end without `NeedsSnapshots`.

    The router then chooses among all engines that work, by what it has sent them and when they
    answered. It still judges engines by what it predicted of them: `_judging_early`.
    """
    policy = POLICIES[settings.policy]
    return (
        not policy.reads_engines
        and not (policy.holds if settings.hold is None else settings.hold)
        and settings.hedge_factor is None
        and min(settings.stale_s, settings.hang_s) > 3.0 * HEARTBEAT_S
    )


def _judging_early(settings: RouterSettings) -> RouterSettings:
    """Return settings under which breakers open wherever they would by any prediction, and earlier.

    A first token counts as slow from the floor on, whatever was predicted. There may then be
    more slow calls than otherwise, and none fewer, and half as many of them open a breaker.
    """
    breaker = settings.breaker
    stricter = breaker.model_copy(
        update={
            "slow_factor": 0.0,
            "max_slow_share": 0.5 * breaker.max_slow_share,
            "min_calls": max(1, breaker.min_calls // 2),
        }
    )
    return settings.model_copy(update={"breaker": stricter})


def _slow_step_s(settings: RouterSettings) -> float:
    """Return how long a step must be for the router to judge its engine by it, seconds, at least.

    As slow, or as hung.
    """
    return min(settings.breaker.slow_floor_s, 0.5 * settings.hang_s)
