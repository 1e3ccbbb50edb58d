"""What do the parts of a simulation need of one another?

The `World` is the run as a gateway or a node knows it: the time, the list of events, and what
else is there. A `Receiver` is a gateway as the nodes know it. `Simulation` and `Gateway` are
these; with the types here, no part imports the one that holds it.
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
    """Between gateways and engines."""

    # Measured on loopback: 0.5 ms at the median. What a profile says of it comes first.
    submit_s: float = 0.0005  # from a decision to the engine's queue
    reply_s: float = 0.0005  # from the end of a step to the gateway
    snapshot_interval_s: float = SNAPSHOT_INTERVAL_S
    snapshot_loss: float = 0.0  # share of snapshots that never arrive


class Receiver(Protocol[NodeT_contra]):
    """A gateway: who sends jobs to nodes and gets what they tell."""

    number: int
    router: Router
    listens: bool  # news of an engine is an event of its own

    def has_streams(self, node: NodeT_contra) -> bool:
        """Whether a request of the gateway is on the engine, or on its way there or back."""
        ...

    def on_step(self, message: tuple[NodeT_contra, list[Job], list[Progress]]) -> None:
        """Take in what a step brought: new prompts, first tokens, ends."""
        ...

    def on_snapshot(self, node: NodeT_contra, /) -> None:
        """Take in a snapshot that has come while the gateway listens."""
        ...

    def on_replica_draining(self, node: NodeT_contra) -> None:
        """Send the node no more requests."""
        ...


class World(Protocol[NodeT]):
    """The run as its gateways and nodes know it."""

    now_s: float
    workload: Workload
    network: Network
    journal: Journal
    nodes: dict[str, NodeT]
    providers: dict[str, ProviderModel]
    segment_tokens: int  # what one hash of a job covers
    contention: float  # how much longer a step takes while all other engines step too
    eager: bool  # every step and every snapshot is an event of its own
    always_listens: bool  # so do all gateways
    num_open: int  # requests
    num_listening: int  # gateways

    @property
    def gateways(self) -> Sequence[Receiver[NodeT]]: ...

    def call_at(self, time_s: float, act: Callable[[T], None], argument: T) -> None:
        """Have `act(argument)` called at this time; equal times in order of asking."""
        ...

    def priority_of(self, gateway: Receiver[NodeT], request: Request, arrival: Arrival) -> int:
        """Return what the engine is told: lower is first."""
        ...

    def remove_node(self, node: NodeT) -> None:
        """End an engine at once; what it had is lost."""
        ...
