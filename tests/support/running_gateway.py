"""A gateway over real sockets: HTTP in front, fake engines behind."""

import asyncio
import contextlib

import httpx

from router import EngineInfo
from serving.capacity.service import free_ports
from serving.config import parse
from serving.gateway.app import Gateway
from serving.gateway.http.listener import Listener
from serving.stream.server import StreamServer
from tests.support.fakes import INFO, FakeEngine

CHAT = "/v1/chat/completions"


class System:
    """A gateway with its listener, and the engines it knows."""

    def __init__(self, gateway: Gateway, client: httpx.AsyncClient) -> None:
        self.gateway = gateway
        self.client = client
        self.engines: list[FakeEngine] = []
        self.servers: list[StreamServer] = []
        self.members: dict[str, dict] = {}

    async def add_engine(
        self,
        chunk: bytes | None = None,
        info: EngineInfo = INFO,
        engine: FakeEngine | None = None,
    ) -> FakeEngine:
        engine = engine or FakeEngine(info)
        engine.chunk = chunk or engine.chunk
        server = StreamServer(engine, self.gateway.config.gateway.stream_window_bytes)
        host, port = await server.listen("127.0.0.1")
        self.members[f"r{len(self.servers)}"] = {
            "host": host,
            "port": port,
            "secret": server.secret,
        }
        self.engines.append(engine)
        self.servers.append(server)
        count = len(self.gateway.driver.engines.infos) + 1
        self.gateway.driver.engines.set_members(self.members)
        await self.until(lambda: len(self.gateway.driver.engines.infos) == count)
        return engine

    async def rename_engine(self, name: str) -> None:
        """Give the last engine another name, as servers that already run have theirs."""
        self.members[name] = self.members.popitem()[1]
        engines = self.gateway.driver.engines
        engines.set_members(self.members)
        await self.until(lambda: engines.infos.keys() == self.members.keys())

    async def until(self, condition, timeout_s: float = 5.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.005)

    def chat(self, **fields) -> dict:
        messages = [{"role": "user", "content": "hi"}]
        return {"model": "fake-model", "messages": messages, "stream": True, **fields}

    @property
    def num_engine_streams(self) -> int:
        return sum(server.num_streams for server in self.servers)

    @property
    def outcomes(self) -> dict:
        return self.gateway.state().outcomes

    def assert_empty(self) -> None:
        """Nothing is booked, held or open any more."""
        state = self.gateway.state()
        assert state.num_open_requests == state.num_placed == 0
        assert state.held.num_requests == state.held.num_bytes == 0
        assert state.fallback.num_open == 0
        for replica in state.replicas.values():
            assert replica.ledger.num_open == replica.ledger.num_kv_tokens == 0


def free_port() -> int:
    return free_ports(1)[0]


@contextlib.asynccontextmanager
async def running(
    num_engines: int = 2,
    served_names: tuple[str, ...] = (),
    rank: int = 0,
    gateway_id: str = "gateway",
    **settings,
):
    """A system with these sections of the configuration, up on a free port.

    `served_names`: what the gateway knows that engines will serve.
    """
    port = free_port()
    config = parse({**settings, "gateway": {"port": port, **settings.get("gateway", {})}})
    gateway = Gateway(config, gateway_id, served_names=served_names, rank=rank)
    listener = Listener(gateway.app, config.gateway)
    await listener.start()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", timeout=10, limits=limits
    ) as client:
        system = System(gateway, client)
        try:
            for _ in range(num_engines):
                await system.add_engine()
            yield system
        finally:
            for engine in system.engines:
                engine.gate.set()
            gateway.close()
            for server in system.servers:
                server.close()
            await listener.stop()


@contextlib.asynccontextmanager
async def running_together(num_gateways: int = 2, num_engines: int = 2, **settings):
    """Systems whose gateways, g0, g1 and so on, know each other; the first one has the engines."""
    settings["gateway"] = {"replicas": num_gateways, **settings.get("gateway", {})}
    async with contextlib.AsyncExitStack() as stack:
        systems = [
            await stack.enter_async_context(
                running(0, rank=rank, gateway_id=f"g{rank}", **settings)
            )
            for rank in range(num_gateways)
        ]
        for _ in range(num_engines):
            await systems[0].add_engine()
        for system in systems[1:]:
            system.gateway.driver.engines.set_members(systems[0].members)
        await introduce(systems)
        for system in systems:
            infos = system.gateway.driver.engines.infos
            await system.until(lambda infos=infos: len(infos) == num_engines)
        yield systems


async def introduce(systems: list[System]) -> None:
    """Have gateways know each other."""
    members = {}
    for system in systems:
        peers = system.gateway.together.peers
        if not peers.metadata:
            await peers.listen("127.0.0.1")
        members[system.gateway.gateway_id] = peers.metadata
    for system in systems:
        peers = system.gateway.together.peers
        peers.set_members(members)
        await peers.met(5.0)
