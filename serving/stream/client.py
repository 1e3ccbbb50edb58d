"""What does an engine tell its gateway? The gateway's end of the connection."""

import asyncio
from typing import Protocol

from router import BlockUpdate, EngineInfo, EngineSnapshot
from serving.stream.connection import FrameConnection
from serving.stream.frames import (
    Blocks,
    Data,
    End,
    Head,
    Hello,
    Prompt,
    Snapshot,
    Welcome,
    decode_to_gateway,
)
from serving.stream.tls import HANDSHAKE_TIMEOUT_S, trust_only


class StreamEvents(Protocol):
    """What a `StreamClient` calls, always on the event loop and in the order received."""

    def on_welcome(self, client: "StreamClient", info: EngineInfo) -> None: ...
    def on_snapshot(self, client: "StreamClient", snapshot: EngineSnapshot) -> None: ...
    def on_blocks(self, client: "StreamClient", update: BlockUpdate) -> None: ...
    def on_prompt(self, client: "StreamClient", frame: Prompt) -> None: ...
    def on_head(self, client: "StreamClient", frame: Head) -> None: ...
    def on_data(self, client: "StreamClient", frame: Data) -> None: ...
    def on_end(self, client: "StreamClient", frame: End) -> None: ...
    def on_lost(self, client: "StreamClient") -> None: ...


class StreamClient(FrameConnection):
    """One connection to one engine's replica. Once lost it is never used again."""

    def __init__(self, replica_id: str, secret: str, events: StreamEvents) -> None:
        super().__init__()
        self.replica_id = replica_id
        self._hello = Hello(secret)
        self._events = events

    @classmethod
    async def connect(cls, replica_id: str, metadata: dict, events: StreamEvents) -> "StreamClient":
        """Connect to the address in a replica's metadata. Raise `OSError` if that fails."""
        loop = asyncio.get_running_loop()
        certificate = metadata.get("certificate")
        _, client = await loop.create_connection(
            lambda: cls(replica_id, metadata["secret"], events),
            metadata["host"],
            metadata["port"],
            ssl=trust_only(certificate) if certificate else None,
            ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S if certificate else None,
        )
        return client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.post(self._hello)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._events.on_lost(self)

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
            elif isinstance(frame, Welcome):
                events.on_welcome(self, frame.info)
