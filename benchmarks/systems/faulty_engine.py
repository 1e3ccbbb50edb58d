"""What does an engine look like that fails? Any engine, made to fail on demand.

Each faulty engine stands behind a stream server of its own, as Ray's replicas do.
"""

import asyncio
import itertools
from collections.abc import Callable, Sequence

import msgspec
from starlette.types import Message, Receive, Scope, Send

from router import EngineSnapshot
from serving.config import GatewayConfig
from serving.stream.accounting import RequestAccounting
from serving.stream.engine import Engine
from serving.stream.server import StreamServer

_WINDOW_BYTES = GatewayConfig().stream_window_bytes
_NOTICED_S = 0.1  # from a replica's end to Ray's word of it


class FaultyEngine:
    """A `serving.stream.engine.Engine` around another one.

    A hung engine sends nothing and counts no step. A silent one pushes no snapshot. A dead one
    answers every stream with the news of its death.
    """

    def __init__(self, engine: Engine) -> None:
        self.info = engine.info
        self.blocks = engine.blocks
        self.dead = False
        self.lifeline = None  # the event loop itself computes
        self.is_silent = False
        self._engine = engine
        self._runs = asyncio.Event()  # cleared while it hangs
        self._runs.set()
        self._snapshot_at_hang: EngineSnapshot | None = None

    def hang(self) -> None:
        """Stop in the middle of a step."""
        self._runs.clear()

    def recover(self) -> None:
        """End every fault: the engine continues as if there had been none."""
        self._snapshot_at_hang = None
        self.is_silent = self.dead = False
        self._runs.set()

    def subscribe(self, on_step: Callable[[], None]) -> None:
        self._engine.subscribe(on_step)

    def snapshot(self, seq: int, accountings: list[RequestAccounting]) -> EngineSnapshot:
        snapshot = self._engine.snapshot(seq, accountings)
        if not self._runs.is_set():
            # What the core last told; requests that come are still counted.
            self._snapshot_at_hang = self._snapshot_at_hang or snapshot
            num_inflight = snapshot.num_inflight_reqs
            snapshot = msgspec.structs.replace(
                self._snapshot_at_hang, seq=seq, num_inflight_reqs=num_inflight
            )
        return snapshot

    def forget(self, accounting: RequestAccounting) -> None:
        self._engine.forget(accounting)

    async def ping(self) -> None:
        await self._runs.wait()

    async def shutdown(self) -> None:
        await self._engine.shutdown()

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_unless_hung(message: Message) -> None:
            await self._runs.wait()
            await send(message)

        await self._engine.app(scope, receive, send_unless_hung)


class FaultyStreamServer(StreamServer):
    """A stream server that pushes no snapshots while its engine is silent."""

    engine: FaultyEngine

    def _push_snapshots(self) -> None:
        if not self.engine.is_silent:
            super()._push_snapshots()


class FaultyFleet:
    """Engines and their stream servers, named as by Ray: each new server is a new replica."""

    def __init__(
        self, engines: Sequence[FaultyEngine], set_members: Callable[[dict[str, dict]], None]
    ) -> None:
        """`set_members` is told of all replicas whenever one comes or goes."""
        self.engines = engines
        self._servers: dict[FaultyEngine, FaultyStreamServer] = {}
        self._names: dict[FaultyEngine, str] = {}
        self._members: dict[str, dict] = {}
        self._set_members = set_members
        self._numbers = itertools.count()

    async def add_engine(self, engine: FaultyEngine) -> None:
        """Start a server for the engine, as a replica with a new name."""
        server = self._servers[engine] = FaultyStreamServer(engine, _WINDOW_BYTES)
        host, port = await server.listen("127.0.0.1")
        name = self._names[engine] = f"r{next(self._numbers)}"
        self._members[name] = {"host": host, "port": port, "secret": server.secret}
        self._set_members(self._members)

    async def remove_engine(self, engine: FaultyEngine) -> None:
        """Break the engine's connections; a little later Ray has noticed that it is gone."""
        self._servers.pop(engine).close()
        await asyncio.sleep(_NOTICED_S)
        del self._members[self._names.pop(engine)]
        self._set_members(self._members)
