"""What do requests do that hurt the engine that works on them? Engines that take such poison.

A request's `user` field names the poison. Everything else about it is as in any request.
"""

import asyncio
import enum
from collections import Counter
from collections.abc import Callable

import msgspec
from starlette.types import Message, Receive, Scope, Send

from benchmarks.systems.faulty_engine import FaultyEngine
from serving.engine.emulated.asgi import error_content, reply
from serving.stream.engine import Engine

_TOKENS_BEFORE_LATE_END = 3  # of a reply, in the middle of which the engine ends
_BLOCK_S = 4.5  # longer than a silence may last
_BLOAT_S = 2.0  # until memory is used up; others decode on meanwhile
_BIG_BYTES = 4 * 2**20


class Poison(enum.Enum):
    """One way for a request to hurt an engine, or to try."""

    ERROR_500 = "answered 500 by every engine"
    ERROR_503 = "answered 503 by every engine"
    RAISES = "the API layer raises before it answers"
    BREAKS_OFF = "the reply breaks off after its first bytes"
    SHORT = "the reply ends without its end"
    ENDS_AT_PREFILL = "ends the engine at its prefill"
    ENDS_AT_TOKEN = f"ends the engine at its token {_TOKENS_BEFORE_LATE_END}"
    HANGS = "hangs the engine at its prefill"
    HANGS_AT_TOKEN = f"hangs the engine at its token {_TOKENS_BEFORE_LATE_END}"
    BLOATS = f"ends the engine after {_BLOAT_S:g} s, for want of memory"
    BLOCKS = f"keeps the engine silent for {_BLOCK_S:g} s, as a busy event loop does"
    BIG = f"a chunk of {_BIG_BYTES // 2**20} MB"

    @property
    def is_deadly(self) -> bool:
        return self in _DEADLY


_DEADLY = frozenset(
    {
        Poison.ENDS_AT_PREFILL,
        Poison.ENDS_AT_TOKEN,
        Poison.HANGS,
        Poison.HANGS_AT_TOKEN,
        Poison.BLOATS,
    }
)


class _Fields(msgspec.Struct):
    user: str | None = None


_decode = msgspec.json.Decoder(_Fields).decode


class PoisonedEngine(FaultyEngine):
    """A faulty engine whose faults are caused by requests."""

    def __init__(self, engine: Engine, on_end: Callable[["PoisonedEngine", Poison], None]) -> None:
        """`on_end` is called when a poison ends or hangs the engine; its process then exits."""
        super().__init__(engine)
        self.num_taken: Counter[Poison] = Counter()
        self._end = on_end

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        first: Message | None = await receive()
        assert first is not None
        user = _decode(first.get("body", b"{}")).user

        async def receive_again() -> Message:
            nonlocal first
            if first is not None:
                message, first = first, None
                return message
            return await receive()

        names = {poison.name for poison in Poison}
        if user in names:
            poison = Poison[user]
            self.num_taken[poison] += 1
            await self._take(poison, scope, receive_again, send)
        else:
            await super().app(scope, receive_again, send)

    async def _take(self, poison: Poison, scope: Scope, receive: Receive, send: Send) -> None:
        if poison in (Poison.ERROR_500, Poison.ERROR_503):
            status = int(poison.name[-3:])
            await reply(send, status, error_content("an error of the engine's", status))
        elif poison is Poison.RAISES:
            raise RuntimeError("poison")
        elif poison is Poison.ENDS_AT_PREFILL:
            self._end(self, poison)
        elif poison is Poison.HANGS:
            self.hang()
            self._end(self, poison)
            await asyncio.Event().wait()
        elif poison is Poison.BLOATS:
            await asyncio.sleep(_BLOAT_S)
            self._end(self, poison)
        elif poison is Poison.BLOCKS:
            self.is_silent = True
            await asyncio.sleep(_BLOCK_S)
            self.is_silent = False
            await super().app(scope, receive, send)
        else:
            await super().app(scope, receive, self._spoiled(poison, send))

    def _spoiled(self, poison: Poison, send: Send) -> Send:
        """Return `send` for a reply that begins well."""
        num_sent = 0

        async def spoiled(message: Message) -> None:
            nonlocal num_sent
            if message["type"] == "http.response.body":
                num_sent += 1
            if poison is Poison.BIG and num_sent == 1:
                padding = b": " + b"x" * _BIG_BYTES + b"\n\n"
                message = {**message, "body": padding + message.get("body", b"")}
            elif poison is Poison.BREAKS_OFF and num_sent == 2:
                raise RuntimeError("poison")
            elif poison is Poison.SHORT and num_sent >= 2:
                return
            elif num_sent == _TOKENS_BEFORE_LATE_END and poison is Poison.ENDS_AT_TOKEN:
                self._end(self, poison)
            elif num_sent == _TOKENS_BEFORE_LATE_END and poison is Poison.HANGS_AT_TOKEN:
                self.hang()
                self._end(self, poison)
                await asyncio.Event().wait()
            await send(message)

        return spoiled
