"""What do the parts of a simulation need of one another?

A `World` is the run as a gateway or a node sees it: the time, the event heap and the other parts.
A `Receiver` is a gateway as a node sees it. `Simulation` and `Gateway` are these. With the types
here no part imports the one that holds it. They are classes and not protocols, for compiled code
reads an attribute of a class at once and has to look up one of a protocol.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappush
from typing import Any, Generic, TypeVar

from router import EngineSnapshot, Request, Router, RouterSettings
from router.simulation.engine.sequence import Job, Progress
from router.simulation.journal import Journal
from router.simulation.provider import ProviderModel
from router.simulation.workload.workload import Arrival, Workload
from router.types import BOOKING_INTERVAL_S, SNAPSHOT_INTERVAL_S

T = TypeVar("T")
NodeT = TypeVar("NodeT")


@dataclass(frozen=True)
class Network:
    """Delays between gateways and engines."""

    # Measured on loopback: 0.5 ms at the median. A profile's `path_s` takes precedence.
    submit_s: float = 0.0005  # from the decision to the engine's queue
    reply_s: float = 0.0005  # from the end of a step to the gateway
    snapshot_interval_s: float = SNAPSHOT_INTERVAL_S
    booking_interval_s: float = BOOKING_INTERVAL_S  # of snapshots that tell other gateways of one
    gate: bool = True  # with several gateways engines give back what they are too busy for
    snapshot_loss: float = 0.0  # share of snapshots that never arrive


class NeedsSnapshots(Exception):
    """A run without snapshots has come to where they may change a decision."""


class Exchange:
    """One client's request and the jobs that engines run for it, until it ends."""

    __slots__ = (
        "awaits_first_token",
        "has_begun",
        "jobs",
        "num_jobs",
        "num_output_tokens",
        "number",
        "request",
    )

    def __init__(self, number: int, request: Request) -> None:
        self.number = number  # of the arrival
        self.request = request
        self.jobs: dict[str, str] = {}  # by engine: one, or two while hedged
        self.num_jobs = 0  # so far
        self.num_output_tokens = 0  # sent by engines that then failed
        self.has_begun = False  # its first token has come
        self.awaits_first_token = True  # of the present attempt


class Receiver(Generic[NodeT]):
    """A gateway: sends jobs to nodes, receives their steps and snapshots."""

    def __init__(self, number: int, settings: RouterSettings, *, listens: bool) -> None:
        self.number = number
        self.router = Router(settings)
        self.listens = listens  # every snapshot that arrives is an event of its own

    def has_streams(self, node: NodeT) -> bool:
        """Whether a request of the gateway is on the engine, or on its way there or back."""
        raise NotImplementedError

    def on_step(self, message: tuple[NodeT, list[Job], list[Progress]]) -> None:
        """Process a step's results: jobs that entered the engine, and progress."""
        raise NotImplementedError

    def on_snapshot(self, node: NodeT, /) -> None:
        """Process a snapshot that has arrived while the gateway listens."""
        raise NotImplementedError

    def on_refused_as_busy(self, message: tuple[NodeT, str, EngineSnapshot]) -> None:
        """Process that the node gives a job back, with what it has now."""
        raise NotImplementedError

    def on_replica_draining(self, node: NodeT) -> None:
        """Send the node no more requests, or some again: by whether it drains."""
        raise NotImplementedError


class World(Generic[NodeT]):
    """The run as its gateways and nodes see it."""

    def __init__(
        self,
        workload: Workload,
        network: Network,
        *,
        segment_tokens: int,
        contention: float,
        eager: bool,
        reports: bool,
    ) -> None:
        self.now_s = 0.0
        self.workload = workload
        self.network = network
        self.journal = Journal(workload)
        self.gateways: Sequence[Receiver[NodeT]] = ()
        self.nodes: dict[str, NodeT] = {}
        self.providers: dict[str, ProviderModel] = {}
        self.segment_tokens = segment_tokens  # tokens that one hash of a job covers
        self.contention = contention  # how much longer a step takes while all other engines step
        self.eager = eager  # every step and every snapshot is an event of its own
        self.reports = reports  # engines send snapshots of their changes, not heartbeats alone
        # All gateways listen all the time. A gateway that detects a lost snapshot asks for all
        # blocks at once, so it must not detect it late. And heartbeats alone are few.
        self.always_listens = eager or not reports or network.snapshot_loss > 0.0
        self.num_open = 0  # requests that have arrived and not ended
        self.num_listening = 0  # gateways that listen now
        # Snapshots may be delivered when the next request arrives, though another event comes
        # before: nothing that such an event does depends on them.
        self.is_calm = False
        self.slow_step_s = math.inf  # what is longer is told to `on_slow_step`
        self.num_events = 0
        self.heap: list[tuple[float, int, Callable[[Any], None], Any]] = []

    def call_at(self, time_s: float, act: Callable[[T], None], argument: T) -> None:
        """Schedule `act(argument)` at this time; equal times run in the order of the calls."""
        self.num_events += 1
        heappush(self.heap, (time_s, self.num_events, act, argument))

    def on_slow_step(self) -> None:
        """Note that a step takes so long that a router may judge its engine by it."""
        raise NotImplementedError

    def priority_of(self, gateway: Receiver[NodeT], request: Request, arrival: Arrival) -> int:
        """Return the priority that the engine gets, as vLLM's: lower is first."""
        raise NotImplementedError

    def remove_node(self, node: NodeT) -> None:
        """Remove an engine at once; the jobs in it are lost."""
        raise NotImplementedError
