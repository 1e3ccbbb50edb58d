"""What do the parts of a simulation need of one another?

A `World` is the run as a gateway or a node sees it: the time, the event heap and the other parts.
A `Receiver` is a gateway as a node sees it. `Simulation` and `Gateway` implement them. With the
types here no part imports the one that holds it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from router import Request, Router
from router.simulation.engine.sequence import Job, Progress
from router.simulation.journal import Journal
from router.simulation.provider import ProviderModel
from router.simulation.workload.workload import Arrival, Workload
from router.types import SNAPSHOT_INTERVAL_S

T = TypeVar("T")
NodeT = TypeVar("NodeT")
NodeT_contra = TypeVar("NodeT_contra", contravariant=True)


@dataclass(frozen=True)
class Network:
    """Delays between gateways and engines."""

    # Measured on loopback: 0.5 ms at the median. A profile's `path_s` takes precedence.
    submit_s: float = 0.0005  # from the decision to the engine's queue
    reply_s: float = 0.0005  # from the end of a step to the gateway
    snapshot_interval_s: float = SNAPSHOT_INTERVAL_S
    snapshot_loss: float = 0.0  # share of snapshots that never arrive


class Receiver(Protocol[NodeT_contra]):
    """A gateway: sends jobs to nodes, receives their steps and snapshots."""

    number: int
    router: Router
    listens: bool  # every snapshot that arrives is an event of its own

    def has_streams(self, node: NodeT_contra) -> bool:
        """Whether a request of the gateway is on the engine, or on its way there or back."""
        ...

    def on_step(self, message: tuple[NodeT_contra, list[Job], list[Progress]]) -> None:
        """Process a step's results: jobs that entered the engine, and progress."""
        ...

    def on_snapshot(self, node: NodeT_contra, /) -> None:
        """Process a snapshot that has arrived while the gateway listens."""
        ...

    def on_replica_draining(self, node: NodeT_contra) -> None:
        """Send the node no more requests."""
        ...


class World(Protocol[NodeT]):
    """The run as its gateways and nodes see it."""

    now_s: float
    workload: Workload
    network: Network
    journal: Journal
    nodes: dict[str, NodeT]
    providers: dict[str, ProviderModel]
    segment_tokens: int  # tokens that one hash of a job covers
    contention: float  # how much longer a step takes while all other engines step too
    eager: bool  # every step and every snapshot is an event of its own
    always_listens: bool  # all gateways listen all the time
    num_open: int  # requests that have arrived and not ended
    num_listening: int  # gateways that listen now

    @property
    def gateways(self) -> Sequence[Receiver[NodeT]]: ...

    def call_at(self, time_s: float, act: Callable[[T], None], argument: T) -> None:
        """Schedule `act(argument)` at this time; equal times run in the order of the calls."""
        ...

    def priority_of(self, gateway: Receiver[NodeT], request: Request, arrival: Arrival) -> int:
        """Return the priority that the engine gets, as vLLM's: lower is first."""
        ...

    def remove_node(self, node: NodeT) -> None:
        """Remove an engine at once; the jobs in it are lost."""
        ...
