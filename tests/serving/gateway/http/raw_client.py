"""A client that writes what it likes, and reads replies as HTTP defines them."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import httptools

from tests.support.running_gateway import CHAT, System


class RawReply:
    """One reply, whole."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.is_complete = False
        self._parser = httptools.HttpResponseParser(self)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode()

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.is_complete = True

    def feed(self, line: bytes) -> None:
        self._parser.feed_data(line)

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's error object, which has to be all there is."""
        assert self.headers["content-type"] == "application/json"
        content = json.loads(self.body)
        assert content.keys() == {"error"}
        assert content["error"].keys() == {"message", "type", "param", "code"}
        assert self.headers["x-request-id"]
        return content["error"]


class RawClient:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self._writer = writer

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    async def send_all(self, data: bytes, pieces: int) -> None:
        """Send `data` so many times, as fast as the gateway reads it."""
        for _ in range(pieces):
            self._writer.write(data)
            await self._writer.drain()

    async def read_reply(self, timeout_s: float = 5.0) -> RawReply:
        """Return the next reply; of what comes after it nothing is read."""
        reply = RawReply()
        async with asyncio.timeout(timeout_s):
            while not reply.is_complete:
                byte = await self.reader.read(1)
                if not byte:
                    assert reply.status, "the connection ended without a reply"
                    assert "content-length" not in reply.headers, "it ended within a reply"
                    assert "transfer-encoding" not in reply.headers, "it ended within a reply"
                    return reply
                reply.feed(byte)
        return reply

    async def is_closed(self, timeout_s: float = 3.0) -> bool:
        """Whether the connection ends in time, without a further byte."""
        async with asyncio.timeout(timeout_s):
            return await self.reader.read() == b""


@contextlib.asynccontextmanager
async def connected(system: System) -> AsyncIterator[RawClient]:
    """A connection to the gateway."""
    port = system.gateway.config.gateway.port
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield RawClient(reader, writer)
    finally:
        writer.close()


def post(body: Any, *headers: str, path: str = CHAT, version: str = "1.1") -> bytes:
    """Return a request; a `body` of bytes goes as it is, anything else as JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/{version}", "host: localhost", *headers]
    return "\r\n".join([*lines, f"content-length: {len(content)}", "", ""]).encode() + content


def get(path: str, *headers: str, method: str = "GET", version: str = "1.1") -> bytes:
    return "\r\n".join(
        [f"{method} {path} HTTP/{version}", "host: localhost", *headers, "", ""]
    ).encode()
