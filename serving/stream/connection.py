"""One end of the multiplexed stream: framing and coalesced writes, common to both ends."""

import asyncio
import socket
from collections.abc import Callable

import msgspec

from serving.stream.frames import MessageBuffer, ToEngine, ToGateway, encode


class FrameConnection(asyncio.Protocol):
    """Frames posted in one turn of the event loop leave in one write.

    Subclasses take what comes in `on_message` (whole messages, undecoded; a
    `ValueError` or `MsgspecError` from it closes the connection: the peer is
    not one of ours) and may add to what goes in `outgoing`.
    """

    def __init__(self) -> None:
        self._messages = MessageBuffer()
        self._frames: list = []
        self._flush_scheduled = False
        self._transport: asyncio.Transport | None = None
        self._call_soon: Callable = asyncio.get_running_loop().call_soon

    def on_message(self, message: bytes) -> None:
        raise NotImplementedError

    def outgoing(self, frames: list) -> list:
        """Return what to send when `frames` are due."""
        return frames

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        try:
            self._messages.feed(data, self.on_message)
        except (ValueError, msgspec.MsgspecError):
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None

    def post(self, frame: ToEngine | ToGateway) -> None:
        """Send `frame` with everything else of this turn."""
        self._frames.append(frame)
        self.schedule_flush()

    def schedule_flush(self) -> None:
        if not self._flush_scheduled:
            self._flush_scheduled = True
            # What the same event woke stands in the loop's ready queue already,
            # so it posts before this runs.
            self._call_soon(self._flush)

    def close(self) -> None:
        """Send what is due, then hang up."""
        if self._transport is not None:
            self._flush()
            self._transport.close()

    def _flush(self) -> None:
        self._flush_scheduled = False
        frames, self._frames = self._frames, []
        if self._transport is not None and (frames := self.outgoing(frames)):
            self._transport.write(encode(frames))
