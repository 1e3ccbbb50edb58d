"""How much may who connects to an engine cost it before we know who it is?

Four kilobytes and five seconds, as one of a bounded number. Then a connection has said `Hello`,
with a secret that only a gateway knows, or it is closed.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from serving.stream.connection import FrameConnection
from serving.stream.frames import MAX_MESSAGE_BYTES, Hello, decode_to_engine

HELLO_TIMEOUT_S = 5.0
MAX_HELLO_BYTES = 4096
MAX_STRANGERS = 256  # connected to one port at a time; gateways say `Hello` at once


class StrangerConnection(FrameConnection):
    """A connection whose peer has to say `Hello` before anything else.

    Subclasses check it in `on_hello`, which raises `ValueError` if it is not a gateway's.
    """

    def __init__(self, strangers: set["StrangerConnection"]) -> None:
        """`strangers` are those of the same port that have not said it yet."""
        super().__init__(MAX_HELLO_BYTES)
        self._strangers = strangers
        self._timer: asyncio.TimerHandle | None = None
        self._said_hello = False

    def on_hello(self, hello: Hello) -> None:
        raise NotImplementedError

    def on_frame(self, frame: Any) -> None:
        raise NotImplementedError

    def decode(self, message: bytes) -> Sequence[Any]:
        """Return a message's frames. Raise `ValueError` or `MsgspecError` for what is none."""
        return decode_to_engine(message)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if len(self._strangers) >= MAX_STRANGERS:
            self.abort()
            return
        self._strangers.add(self)
        self._timer = asyncio.get_running_loop().call_later(HELLO_TIMEOUT_S, self.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget()

    def on_message(self, message: bytes) -> None:
        for frame in self.decode(message):
            if self._said_hello:
                self.on_frame(frame)
            elif isinstance(frame, Hello):
                self.on_hello(frame)
                self._said_hello = True
                self.allow_bytes(MAX_MESSAGE_BYTES)
                self._forget()
            else:
                raise ValueError("the first frame is no Hello")

    def _forget(self) -> None:
        """End what is only for strangers."""
        self._strangers.discard(self)
        if self._timer is not None:
            self._timer.cancel()
