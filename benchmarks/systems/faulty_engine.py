"""Any engine, made to fail on demand, behind a stream server of its own."""

import asyncio
import itertools
from collections.abc import Callable

import msgspec
from starlette.types import Message, Receive, Scope, Send

from router.types import EngineSnapshot
from serving.stream.accounting import RequestAccounting
from serving.stream.engine import Engine
from serving.stream.server import StreamServer


class FaultyEngine:
    """The `serving.stream.engine.Engine` around another one.

    Hung, it sends nothing and counts no step; silent, it tells nothing of
    itself; dead, whatever it would send is about that.
    """

    def __init__(self, engine: Engine) -> None:
        self.info = engine.info
        self.blocks = engine.blocks
        self.dead = False
        self.is_silent = False
        self.num_streams = 0
        self._engine = engine
        self._flows = asyncio.Event()
        self._flows.set()
        self._frozen: EngineSnapshot | None = None

    def hang(self) -> None:
        """Stop in the middle of a step."""
        self._flows.clear()

    def go_on(self) -> None:
        """As if nothing had been."""
        self._frozen = None
        self.is_silent = self.dead = False
        self._flows.set()

    def subscribe(self, on_step: Callable[[], None]) -> None:
        self._engine.subscribe(on_step)

    def snapshot(self, seq: int, accountings: list[RequestAccounting]) -> EngineSnapshot:
        snapshot = self._engine.snapshot(seq, accountings)
        if not self._flows.is_set():
            self._frozen = self._frozen or snapshot
            num_steps = self._frozen.num_steps_total
            snapshot = msgspec.structs.replace(snapshot, num_steps_total=num_steps)
        return snapshot

    def forget(self, accounting: RequestAccounting) -> None:
        self._engine.forget(accounting)

    async def ping(self) -> None:
        await self._flows.wait()

    async def shutdown(self) -> None:
        await self._engine.shutdown()

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_if_well(message: Message) -> None:
            await self._flows.wait()
            await send(message)

        self.num_streams += 1
        try:
            await self._engine.app(scope, receive, send_if_well)
        finally:
            self.num_streams -= 1


class FaultyStreamServer(StreamServer):
    """A stream server whose snapshots can be withheld."""

    engine: FaultyEngine

    def _push_snapshots(self) -> None:
        if not self.engine.is_silent:
            super()._push_snapshots()


class FaultyFleet:
    """Engines and their servers, as Ray would name them: each new server is a new replica."""

    def __init__(
        self, engines: list[FaultyEngine], tell: Callable[[dict[str, dict]], None]
    ) -> None:
        self.engines = engines
        self.servers: dict[FaultyEngine, FaultyStreamServer] = {}
        self._names: dict[FaultyEngine, str] = {}
        self._members: dict[str, dict] = {}
        self._tell = tell
        self._numbers = itertools.count()

    async def open(self, engine: FaultyEngine) -> None:
        """Offer the engine, under a name that nobody has had."""
        server = self.servers[engine] = FaultyStreamServer(engine, 64 * 2**10)
        host, port = await server.listen("127.0.0.1")
        name = self._names[engine] = f"r{next(self._numbers)}"
        self._members[name] = {"host": host, "port": port, "secret": server.secret}
        self._tell(self._members)

    def close(self, engine: FaultyEngine) -> None:
        """Lose the engine: its connections break, and Ray names it no longer."""
        del self._members[self._names.pop(engine)]
        self.servers.pop(engine).close()
        self._tell(self._members)
