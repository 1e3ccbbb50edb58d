"""How is another gateway asked, and when is it taken for hung?"""

import asyncio
import contextlib
import time
from collections.abc import Callable

from serving.gateway.observe.peers.frames import Ask, decode_answers
from serving.stream.connection import FrameConnection
from serving.stream.frames import Hello
from serving.stream.tls import HANDSHAKE_TIMEOUT_S, trust_only

# An event loop that takes its turn answers within milliseconds, for large fleets within 0.1 s.
ANSWER_TIMEOUT_S = 1.0
_CONNECT_TIMEOUT_S = 5.0


class NoAnswer(Exception):
    """Another gateway has not answered; the message says why, for people."""


class PeerLink(FrameConnection):
    """One connection to another gateway. Once lost it is never used again."""

    def __init__(self, secret: str, on_lost: Callable[["PeerLink"], object]) -> None:
        super().__init__()
        self._hello = Hello(secret)
        self._on_lost = on_lost
        self._number = 0
        # Questions without an answer, the oldest first, and until when it is in time. One that
        # nobody waits for any more stays: its answer tells that the other one lives again.
        self._pending: dict[int, tuple[asyncio.Future[bytes], float]] = {}

    @classmethod
    async def connect(cls, metadata: dict, on_lost: Callable[["PeerLink"], object]) -> "PeerLink":
        """Connect to what `PeerPort.listen` has returned. Raise `OSError` if that fails."""
        certificate = metadata.get("certificate")
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):  # its `TimeoutError` is an `OSError`
            _, link = await asyncio.get_running_loop().create_connection(
                lambda: cls(metadata["secret"], on_lost),
                metadata["host"],
                metadata["port"],
                ssl=trust_only(certificate, metadata.get("identity")) if certificate else None,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S if certificate else None,
            )
        return link

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.post(self._hello)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        pending, self._pending = self._pending, {}
        for answer, _ in pending.values():
            if not answer.done():
                answer.set_exception(NoAnswer("it has ended, or its connection has"))
                answer.exception()  # whether anybody waits or not
        self._on_lost(self)

    def on_message(self, message: bytes) -> None:
        for frame in decode_answers(message):
            answer, _ = self._pending.pop(frame.number, (None, 0.0))
            if answer is None or answer.done():
                continue
            if frame.error:
                answer.set_exception(NoAnswer(frame.error))
                answer.exception()
            else:
                answer.set_result(frame.body)

    @property
    def silent_s(self) -> float:
        """For how long it owes an answer, seconds; 0 while it answers in time."""
        for _, due_s in self._pending.values():
            late_s = time.monotonic() - due_s
            return ANSWER_TIMEOUT_S + late_s if late_s >= 0.0 else 0.0
        return 0.0

    async def ask(self, what: str, body: bytes = b"", *, insists: bool = False) -> bytes:
        """Return the answer. Raise `NoAnswer` if there is none in time.

        A gateway that owes answers is not asked for more, unless one `insists`: then it will hear
        of it when it can. Nobody waits for it in either case.
        """
        silent_s = self.silent_s
        if silent_s and not insists:
            raise NoAnswer(f"it has not answered for {silent_s:.1f} s")
        self._number += 1
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        number, due_s = self._number, time.monotonic() + ANSWER_TIMEOUT_S
        self._pending[number] = answer, due_s
        self.post(Ask(number, what, body))
        if silent_s:
            raise NoAnswer(
                f"it has not answered for {silent_s:.1f} s; it hears of this when it can"
            )
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(asyncio.shield(answer), ANSWER_TIMEOUT_S)
        if number in self._pending:  # uvloop's timers may be a millisecond early
            self._pending[number] = answer, min(due_s, time.monotonic())
        raise NoAnswer(f"it has not answered within {ANSWER_TIMEOUT_S:g} s")
