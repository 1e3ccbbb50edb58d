"""Between a gateway and an engine: a wire that can lose what the engine tells of its cache."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from serving.stream.frames import (
    Blocks,
    MessageBuffer,
    Resync,
    decode_to_engine,
    decode_to_gateway,
    encode,
)


class LossyRelay:
    """Carries a connection's messages both ways; of `Blocks`, those that `keeps()`."""

    def __init__(self, host: str, port: int) -> None:
        self.keeps: Callable[[], bool] = lambda: True
        self.num_kept = 0  # updates of the cached blocks
        self.num_lost = 0
        self.num_resyncs = 0  # asked for by the gateway
        self._address = (host, port)

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[tuple[str, int]]:
        """Host and port to connect to instead."""
        server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[:2]
        finally:
            server.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_engine = await asyncio.open_connection(*self._address)
        with contextlib.suppress(ConnectionError):
            await asyncio.gather(
                _pump(reader, to_engine[1], self._from_gateway),
                _pump(to_engine[0], writer, self._from_engine),
            )

    def _from_gateway(self, message: bytes) -> bytes:
        frames = decode_to_engine(message)
        self.num_resyncs += sum(isinstance(frame, Resync) for frame in frames)
        return encode(frames)

    def _from_engine(self, message: bytes) -> bytes:
        frames = []
        for frame in decode_to_gateway(message):
            if not isinstance(frame, Blocks):
                frames.append(frame)
            elif self.keeps():
                frames.append(frame)
                self.num_kept += 1
            else:
                self.num_lost += 1
        return encode(frames) if frames else b""


async def _pump(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, change: Callable[[bytes], bytes]
) -> None:
    buffer = MessageBuffer()
    try:
        while data := await reader.read(2**16):
            buffer.feed(data, lambda message: writer.write(change(message)))
            await writer.drain()
    finally:
        writer.close()
