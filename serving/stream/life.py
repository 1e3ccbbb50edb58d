"""How does a gateway hear that an engine computes while the engine's replica is busy?

By a second connection, which the replica hands on to whatever computes: see `Lifeline`. Only that
it lives, and with how much to do, is told there. So it is not encrypted, and opened by a token for
this one time, which the first connection was welcomed with.
"""

import asyncio
import secrets
from collections.abc import Callable

from serving.stream.connection import FrameConnection
from serving.stream.engine import Lifeline
from serving.stream.frames import Alive, Hello, ToEngine, decode_to_gateway
from serving.stream.strangers import StrangerConnection


class LifePort:
    """The replica's end: lets gateways in, and passes them on."""

    def __init__(self, lifeline: Lifeline) -> None:
        self.lifeline = lifeline
        self.port = 0
        self.tokens: set[str] = set()
        self._strangers: set[StrangerConnection] = set()
        self._server: asyncio.Server | None = None

    async def listen(self, host: str) -> None:
        """Start listening on a free TCP port of `host`."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _LifeConnection(self, self._strangers), host, 0
        )
        self.port = self._server.sockets[0].getsockname()[1]

    def issue_token(self) -> str:
        """Return what one more connection will be let in with."""
        token = secrets.token_hex(16)
        self.tokens.add(token)
        return token

    def close(self) -> None:
        """Stop listening. Connections that were passed on are not ours to close."""
        if self._server is not None:
            self._server.close()


class _LifeConnection(StrangerConnection):
    """A gateway's connection, on its way from our event loop to what computes."""

    def __init__(self, port: LifePort, strangers: set[StrangerConnection]) -> None:
        super().__init__(strangers)
        self._port = port

    def on_hello(self, hello: Hello) -> None:
        if hello.secret not in self._port.tokens or self._transport is None:
            raise ValueError("a Hello with a wrong token")
        self._port.tokens.discard(hello.secret)
        self._port.lifeline.carry(self._transport.get_extra_info("socket").fileno())
        self.close()  # our end of it: in the other process it stays open

    def on_frame(self, frame: ToEngine) -> None:
        """Do nothing: there is nothing to be told here."""


class LifeClient(FrameConnection):
    """The gateway's end."""

    def __init__(self, token: str, on_alive: Callable[[Alive], None]) -> None:
        super().__init__()
        self._hello = Hello(token)
        self._on_alive = on_alive

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.post(self._hello)

    def on_message(self, message: bytes) -> None:
        for frame in decode_to_gateway(message):
            if isinstance(frame, Alive):
                self._on_alive(frame)
