"""What must an engine do to be served over the stream?"""

from collections.abc import Callable
from typing import Protocol

from starlette.types import ASGIApp

from router import EngineInfo, EngineSnapshot
from router.fleet.block_log import BlockLog
from serving.config import Config
from serving.planning.plan import Plan
from serving.stream.accounting import RequestAccounting


class Lifeline(Protocol):
    """A line to what computes, if that is a process of its own."""

    @property
    def pid(self) -> int:
        """The process that computes."""
        ...

    def carry(self, connection: int) -> None:
        """Have `Alive` frames written to a socket, by whatever this process is busy with.

        The caller may close it then.
        """
        ...

    def beat(self) -> None:
        """Tell what computes that this process's event loop turns."""
        ...


class Engine(Protocol):
    """What a replica puts behind its stream server."""

    @property
    def info(self) -> EngineInfo:
        """What does not change while the engine lives."""
        ...

    @property
    def app(self) -> ASGIApp:
        """The OpenAI application."""
        ...

    @property
    def blocks(self) -> BlockLog:
        """What the prefix cache holds; brought up to date before `on_step()`."""
        ...

    def subscribe(self, on_step: Callable[[], None]) -> None:
        """Have `on_step()` called on the event loop after every engine step."""
        ...

    def snapshot(self, seq: int, accountings: list[RequestAccounting]) -> EngineSnapshot:
        """Return the state now, cheaply. `accountings` are of all requests in the replica."""
        ...

    def forget(self, accounting: RequestAccounting) -> None:
        """Stop computing for a request that has ended, in whatever way."""
        ...

    @property
    def lifeline(self) -> Lifeline | None:
        """Return the line to what computes; None where that is this process's event loop."""
        ...

    @property
    def dead(self) -> bool:
        """Whether the engine can serve no more."""
        ...

    async def ping(self) -> None:
        """Return once what computes has answered; never while it hangs."""
        ...

    async def shutdown(self) -> None:
        """Stop computing and free the device."""
        ...


class EngineFactory(Protocol):
    """What `engine.factory` names: a class of engines that a replica can start."""

    async def start(self, config: Config, plan: Plan, local_rank: int) -> Engine:
        """Return a ready engine. `local_rank` counts the engines on this node from 0."""
        ...
