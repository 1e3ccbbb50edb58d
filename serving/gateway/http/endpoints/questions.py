"""How is one engine asked what no router has to place?

A question computes nothing: it is booked nowhere, waits for nobody, and is in no snapshot. On the
connection it is a stream of a negative number, beside those of the requests.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator

from serving.gateway.http.own_headers import new_id
from serving.stream.client import Connection
from serving.stream.frames import Ack, Cancel, Data, End, Head, Headers, Submit

MAX_ANSWER_BYTES = 64 * 2**20  # of an answer that is taken whole


class NotAnswered(Exception):
    """The engine was lost, or its answer broke off or took too long."""


class Question:
    """One question to one engine, and its answer while it comes."""

    def __init__(self, questions: "Questions", client: Connection, number: int) -> None:
        self._questions = questions
        self._client = client
        self._number = number
        self._frames: asyncio.Queue[Head | Data | End | None] = asyncio.Queue()
        self.head: Head | None = None

    @property
    def replica_id(self) -> str:
        return self._client.replica_id

    def put(self, frame: Head | Data | End | None) -> None:
        """Take what the engine sends; None: it is lost."""
        self._frames.put_nowait(frame)

    async def begin(self, timeout_s: float) -> Head:
        """Return status and headers. Raise `NotAnswered`."""
        try:
            async with asyncio.timeout(timeout_s):
                frame = await self._frames.get()
        except TimeoutError:
            raise NotAnswered(f"no answer within {timeout_s:.0f} s") from None
        if not isinstance(frame, Head):
            raise NotAnswered(_why(frame))
        self.head = frame
        return frame

    async def body(self) -> AsyncIterator[bytes]:
        """Yield what comes of the body; the engine waits for whoever reads. Raise `NotAnswered`."""
        while True:
            frame = await self._frames.get()
            if isinstance(frame, Data):
                yield frame.body
                self._client.post(Ack(self._number, len(frame.body)))
            elif isinstance(frame, End) and frame.error is None:
                return
            else:
                raise NotAnswered(_why(frame))

    async def whole(self, timeout_s: float) -> tuple[int, bytes]:
        """Return status and body. Raise `NotAnswered`."""
        head = await self.begin(timeout_s)
        body = bytearray()
        try:
            async with asyncio.timeout(timeout_s):
                async for chunk in self.body():
                    body += chunk
                    if len(body) > MAX_ANSWER_BYTES:
                        raise NotAnswered("the answer is too long")
        except TimeoutError:
            raise NotAnswered(f"no whole answer within {timeout_s:.0f} s") from None
        return head.status, bytes(body)

    def close(self) -> None:
        """Hear no more of it; the engine stops if it has not answered yet."""
        self._questions.forget(self._client, self._number)


class Questions:
    """All questions that are open, to whichever engine."""

    def __init__(self) -> None:
        self._open: dict[Connection, dict[int, Question]] = {}
        self._numbers = itertools.count(-1, -1)

    def __len__(self) -> int:
        return sum(map(len, self._open.values()))

    def ask(
        self, client: Connection, method: str, path: str, headers: Headers, body: bytes
    ) -> Question:
        """Ask the engine at the other end. `path` may have a query."""
        question = Question(self, client, number := next(self._numbers))
        self._open.setdefault(client, {})[number] = question
        client.post(Submit(number, new_id(), 0, 0, 0, method, path, headers, body))
        return question

    def on_frame(self, client: Connection, frame: Head | Data | End) -> None:
        """Take a frame of one of them; that of one which is over is under way still."""
        if (question := self._open.get(client, {}).get(frame.stream)) is not None:
            question.put(frame)
            if isinstance(frame, End):
                del self._open[client][frame.stream]

    def on_lost(self, client: Connection) -> None:
        """Tell whoever has asked that there is nobody to answer."""
        for question in self._open.pop(client, {}).values():
            question.put(None)

    def forget(self, client: Connection, number: int) -> None:
        """End a question, unless it is over."""
        if self._open.get(client, {}).pop(number, None) is not None:
            client.post(Cancel(number))


def _why(frame: Head | Data | End | None) -> str:
    if isinstance(frame, End):
        return frame.error or "there is no answer"
    return "the engine was lost"
