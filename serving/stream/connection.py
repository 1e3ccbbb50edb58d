"""Which frames leave in one write? Framing and coalesced writes, the same at both ends."""

import asyncio
import socket
from collections.abc import Callable

import msgspec

from serving.stream.frames import MAX_MESSAGE_BYTES, MessageBuffer, encode


class FrameConnection(asyncio.Protocol):
    """Send all frames posted in one iteration of the event loop in one write.

    Subclasses handle what arrives in `on_message`, which gets whole messages,
    undecoded. A `ValueError` or `MsgspecError` from it closes the connection:
    the peer does not speak our protocol. They may add to what is sent in
    `frames_to_send`.
    """

    def __init__(self, max_bytes: int = MAX_MESSAGE_BYTES) -> None:
        """`max_bytes` is how large a message may be at first; see `allow_bytes`."""
        self._messages = MessageBuffer(max_bytes)
        self._frames: list = []
        self._flush_scheduled = False
        self._transport: asyncio.Transport | None = None
        self._call_soon: Callable = asyncio.get_running_loop().call_soon

    def on_message(self, message: bytes) -> None:
        raise NotImplementedError

    def frames_to_send(self, frames: list) -> list:
        """Return what to send when the posted `frames` are due."""
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

    def post(self, frame: msgspec.Struct) -> None:
        """Send `frame` together with all others of this iteration."""
        self._frames.append(frame)
        self.schedule_flush()

    def schedule_flush(self) -> None:
        """Write at the end of this iteration."""
        if not self._flush_scheduled:
            self._flush_scheduled = True
            # Whatever the same event woke is in the loop's ready queue already,
            # so it posts before this runs.
            self._call_soon(self._flush)

    def allow_bytes(self, max_bytes: int) -> None:
        """Take messages of up to so many bytes from now on."""
        self._messages.max_bytes = max_bytes

    def abort(self) -> None:
        """Disconnect at once; what is due is lost."""
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        """Send what is due, then disconnect."""
        if self._transport is not None:
            self._flush()
            self._transport.close()

    def _flush(self) -> None:
        self._flush_scheduled = False
        frames, self._frames = self._frames, []
        if self._transport is not None and (frames := self.frames_to_send(frames)):
            self._transport.write(encode(frames))
