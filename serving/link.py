"""The gateway's end of the multiplexed stream to one engine."""

import asyncio
import socket
from typing import Protocol

import msgspec

from router.types import EngineInfo, EngineSnapshot
from serving.wire import (
    Data,
    End,
    Head,
    Hello,
    MessageBuffer,
    Snapshot,
    ToEngine,
    Welcome,
    decode_to_gateway,
    encode,
)


class LinkEvents(Protocol):
    """What a link tells its owner; always on the event loop, in the order received."""

    def on_welcome(self, link: "Link", info: EngineInfo) -> None: ...
    def on_snapshot(self, link: "Link", snapshot: EngineSnapshot) -> None: ...
    def on_head(self, link: "Link", frame: Head) -> None: ...
    def on_data(self, link: "Link", frame: Data) -> None: ...
    def on_end(self, link: "Link", frame: End) -> None: ...
    def on_lost(self, link: "Link") -> None: ...


class Link(asyncio.Protocol):
    """One connection to one engine replica; lost once, it is never used again."""

    def __init__(self, replica_id: str, secret: str, gateway_id: str, events: LinkEvents) -> None:
        self.replica_id = replica_id
        self._hello = Hello(secret, gateway_id)
        self._events = events
        self._messages = MessageBuffer()
        self._frames: list[ToEngine] = []
        self._flush_scheduled = False
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def connect(
        cls, replica_id: str, metadata: dict, gateway_id: str, events: LinkEvents
    ) -> "Link":
        """Connect to the address in a replica's metadata; raises `OSError`."""
        loop = asyncio.get_running_loop()
        _, link = await loop.create_connection(
            lambda: cls(replica_id, metadata["secret"], gateway_id, events),
            metadata["host"],
            metadata["port"],
        )
        return link

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.post(self._hello)

    def data_received(self, data: bytes) -> None:
        try:
            self._messages.feed(data, self._on_message)
        except (ValueError, msgspec.MsgspecError):
            self.close()  # the peer is no engine of ours

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._events.on_lost(self)

    def close(self) -> None:
        if self._transport is not None:
            self._flush()
            self._transport.close()

    def post(self, frame: ToEngine) -> None:
        """Send `frame` with everything else of this turn of the event loop."""
        self._frames.append(frame)
        if not self._flush_scheduled:
            self._flush_scheduled = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False
        frames, self._frames = self._frames, []
        if frames and self._transport is not None:
            self._transport.write(encode(frames))

    def _on_message(self, message: bytes) -> None:
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
            elif isinstance(frame, Welcome):
                events.on_welcome(self, frame.info)
