"""What does an engine tell its gateway? The gateway's end of the connection."""

import asyncio
import contextlib
from typing import Protocol

from router import BlockUpdate, EngineInfo, EngineSnapshot
from serving.engine.hardware_watch import HardwareState
from serving.stream.connection import FrameConnection
from serving.stream.frames import (
    Alive,
    Blocks,
    Busy,
    Data,
    End,
    Hardware,
    Head,
    Hello,
    Prompt,
    Snapshot,
    ToEngine,
    Welcome,
    decode_to_gateway,
)
from serving.stream.life import LifeClient
from serving.stream.tls import HANDSHAKE_TIMEOUT_S, trust_only


class Connection(Protocol):
    """What the gateway has of an engine: a connection to a replica, or a server of others."""

    @property
    def replica_id(self) -> str: ...
    def post(self, frame: ToEngine) -> None: ...
    def close(self) -> None: ...


class StreamEvents(Protocol):
    """What a `StreamClient` calls, always on the event loop and in the order received.

    What has come in one piece is told of between `on_received` and `on_all_told`.
    """

    def on_received(self, client: Connection) -> None: ...
    def on_all_told(self, client: Connection) -> None: ...
    def on_welcome(self, client: Connection, info: EngineInfo) -> None: ...
    def on_snapshot(self, client: Connection, snapshot: EngineSnapshot) -> None: ...
    def on_blocks(self, client: Connection, update: BlockUpdate) -> None: ...
    def on_prompt(self, client: Connection, frame: Prompt) -> None: ...
    def on_head(self, client: Connection, frame: Head) -> None: ...
    def on_data(self, client: Connection, frame: Data) -> None: ...
    def on_end(self, client: Connection, frame: End) -> None: ...
    def on_busy(self, client: Connection, frame: Busy) -> None: ...
    def on_alive(self, client: Connection, frame: Alive) -> None: ...
    def on_hardware(self, client: Connection, state: HardwareState) -> None: ...
    def on_lost(self, client: Connection) -> None: ...


class StreamClient(FrameConnection):
    """One connection to one engine's replica. Once lost it is never used again."""

    def __init__(self, replica_id: str, secret: str, events: StreamEvents) -> None:
        super().__init__()
        self.replica_id = replica_id
        self._hello = Hello(secret)
        self._events = events
        self._life: LifeClient | None = None
        self._connecting: asyncio.Task[None] | None = None  # to hear of its life

    @classmethod
    async def connect(cls, replica_id: str, metadata: dict, events: StreamEvents) -> "StreamClient":
        """Connect to the address in a replica's metadata. Raise `OSError` if that fails.

        By the `identity` in it the replica knows us; this process adds it.
        """
        loop = asyncio.get_running_loop()
        certificate = metadata.get("certificate")
        _, client = await loop.create_connection(
            lambda: cls(replica_id, metadata["secret"], events),
            metadata["host"],
            metadata["port"],
            ssl=trust_only(certificate, metadata.get("identity")) if certificate else None,
            ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S if certificate else None,
        )
        return client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.post(self._hello)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._connecting is not None:
            self._connecting.cancel()
        if self._life is not None:
            self._life.close()
        self._events.on_lost(self)

    def data_received(self, data: bytes) -> None:
        self._events.on_received(self)
        try:
            super().data_received(data)
        finally:
            self._events.on_all_told(self)

    def on_message(self, message: bytes) -> None:
        events = self._events
        for frame in decode_to_gateway(message):
            if isinstance(frame, Data):
                events.on_data(self, frame)
            elif isinstance(frame, Head):
                events.on_head(self, frame)
            elif isinstance(frame, End):
                events.on_end(self, frame)
            elif isinstance(frame, Snapshot):
                events.on_snapshot(self, frame.snapshot)
            elif isinstance(frame, Blocks):
                events.on_blocks(self, frame.update)
            elif isinstance(frame, Prompt):
                events.on_prompt(self, frame)
            elif isinstance(frame, Busy):
                events.on_busy(self, frame)
            elif isinstance(frame, Hardware):
                events.on_hardware(self, frame.state)
            elif isinstance(frame, Welcome):
                events.on_welcome(self, frame.info)
                if frame.life_port:
                    self._connecting = asyncio.get_running_loop().create_task(
                        self._hear_of_life(frame.life_port, frame.token)
                    )

    async def _hear_of_life(self, port: int, token: str) -> None:
        """Open the second connection. If that fails, the replica alone speaks for its engine."""
        assert self._transport is not None
        host = self._transport.get_extra_info("peername")[0]
        with contextlib.suppress(OSError):
            _, self._life = await asyncio.get_running_loop().create_connection(
                lambda: LifeClient(token, lambda frame: self._events.on_alive(self, frame)),
                host,
                port,
            )
