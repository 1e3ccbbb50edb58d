"""Who may ask this gateway what only gateways ask? Those that Ray has told its secret."""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence

from serving.gateway.observe.peers.frames import Answer, Ask, ToPeer, decode_to_peer
from serving.stream.frames import Hello
from serving.stream.strangers import StrangerConnection
from serving.stream.tls import HANDSHAKE_TIMEOUT_S, make_certificate

logger = logging.getLogger(__name__)

Answering = Callable[[str, bytes], Awaitable[bytes]]


class PeerPort:
    """Listens for other gateways and answers them."""

    def __init__(self, answer: Answering) -> None:
        """`answer` gets what is asked and its body; what it raises is told to whoever asks."""
        self.answer = answer
        self.secret = secrets.token_hex(16)
        self.strangers: set[StrangerConnection] = set()
        self._connections: set[_Asker] = set()
        self._server: asyncio.Server | None = None

    async def listen(self, host: str, *, tls: bool = False, clients: str = "") -> dict:
        """Listen on a free TCP port of `host`. Return what `PeerLink.connect` needs.

        With `tls` only gateways with a certificate of the authority `clients` are let in.
        """
        certificate, context = make_certificate(clients) if tls else ("", None)
        self._server = await asyncio.get_running_loop().create_server(
            lambda: _Asker(self),
            host,
            0,
            ssl=context,
            ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S if tls else None,
        )
        host, port = self._server.sockets[0].getsockname()[:2]
        return {"host": host, "port": port, "secret": self.secret, "certificate": certificate}

    def close(self) -> None:
        """Listen no more, and disconnect everybody."""
        if self._server is not None:
            self._server.close()
        for connection in [*self._connections, *self.strangers]:
            connection.close()

    def add(self, connection: "_Asker") -> None:
        self._connections.add(connection)

    def remove(self, connection: "_Asker") -> None:
        self._connections.discard(connection)


class _Asker(StrangerConnection):
    """Another gateway's connection."""

    def __init__(self, port: PeerPort) -> None:
        super().__init__(port.strangers)
        self._port = port
        self._tasks: set[asyncio.Task[None]] = set()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._port.remove(self)
        for task in self._tasks:
            task.cancel()

    def decode(self, message: bytes) -> Sequence[ToPeer]:
        return decode_to_peer(message)

    def on_hello(self, hello: Hello) -> None:
        """Let a gateway in. Raise `ValueError` if it does not know the secret."""
        if not secrets.compare_digest(hello.secret.encode(), self._port.secret.encode()):
            raise ValueError("a Hello with a wrong secret")
        self._port.add(self)

    def on_frame(self, frame: ToPeer) -> None:
        if isinstance(frame, Ask):
            task = asyncio.get_running_loop().create_task(self._answer(frame))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, ask: Ask) -> None:
        try:
            self.post(Answer(ask.number, await self._port.answer(ask.what, ask.body)))
        except Exception as error:  # or who asks would take us for hung
            if not isinstance(error, ValueError):
                logger.exception("another gateway's question %r has no answer", ask.what)
            self.post(Answer(ask.number, error=f"{type(error).__name__}: {error}"))
