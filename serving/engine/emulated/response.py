"""How is one response of an emulated engine sent, from its job to its last byte?"""

import asyncio
import time
import zlib
from collections.abc import Callable

from starlette.types import Send

from router.simulation.engine.model import EngineModel
from router.simulation.engine.sequence import Job, Progress
from serving.engine.emulated.asgi import EVENTS, reply, send_part
from serving.engine.emulated.completion_text import CompletionText
from serving.engine.emulated.request import Body
from serving.engine.emulated.text import Prompt, reply_word
from serving.stream.accounting import RequestAccounting
from serving.stream.record import Entry, decode_groups


class EmulatedResponse:
    """Sends the tokens of the engine's steps, each as an event of its own.

    A response that another engine has begun (`accounting.resume`) sends the same bytes again and
    has only the rest computed: the tokens that the other has generated follow the prompt. Both
    the bytes and the rest are made of the recorded ids, as a model's are.
    """

    def __init__(
        self,
        job_id: str,
        body: Body,
        prompt: Prompt,
        chat: bool,
        model: str,
        max_tokens: int,
        block_size: int,
        accounting: RequestAccounting | None,
    ) -> None:
        self._body = body
        self._chat = chat
        self._accounting = accounting
        self._wake = asyncio.Event()
        num_sequences = body.n or 1
        self._done: list[int] = []  # ids of the tokens that another engine has generated
        # A record does not say how several sequences were interleaved.
        if accounting is not None and accounting.resume is not None and num_sequences == 1:
            self._done = _token_ids(accounting.resume.record)[: max_tokens - 1]
        self._num_done = len(self._done)
        self._context = prompt.followed_by(self._done)
        self.job = Job(
            id=job_id,
            num_prompt_tokens=prompt.num_tokens + self._num_done,
            num_output_tokens=max_tokens - self._num_done,
            priority=accounting.priority if accounting is not None else body.priority,
            block_hashes=prompt.hashes(block_size, body.cache_salt or ""),
            num_sequences=num_sequences,
            num_expected_cached_tokens=(
                accounting.num_expected_cached_tokens if accounting is not None else 0
            ),
        )
        self._ends: dict[int, int] = {}  # tokens of the sequences that have ended, by index
        self._num_sent = [0] * num_sequences
        self._num_cached_tokens = 0
        self._has_begun = False
        request_id = accounting.request_id if accounting is not None else ""
        created_s = accounting.created_s if accounting is not None else 0
        self._texts = [
            CompletionText(
                chat,
                zlib.crc32((request_id or job_id).encode()) | prompt.seed << 32,
                model,
                prompt.num_tokens,
                index=index,
                word=self._word(index),
                created_s=created_s or int(time.time()),
            )
            for index in range(num_sequences)
        ]

    def _word(self, index: int) -> Callable[[int], bytes]:
        """Return a function from a token's number, from 1, to its text in the reply."""
        done, new_word = self._done, self._context.word(index)
        if not done:
            return new_word
        return lambda number: (
            reply_word(done[number - 1]) if number <= len(done) else new_word(number - len(done))
        )

    def on_progress(self, progress: Progress) -> None:
        """Record that a sequence has begun or ended its output."""
        self._has_begun = True
        self._num_cached_tokens = max(self._num_cached_tokens, progress.num_cached_tokens)
        if progress.finished:
            self._ends[progress.index] = progress.num_tokens + self._num_done

    def on_step(self) -> None:
        """Wake the sender, for there may be tokens to send."""
        if self._has_begun:
            self._wake.set()

    def on_disconnect(self) -> None:
        """Wake the sender, for the client has disconnected."""
        self._wake.set()

    async def send_all(
        self, model: EngineModel, disconnect: asyncio.Task[None], send: Send
    ) -> None:
        """Send the response; return when it is complete or the client has disconnected."""
        body, accounting = self._body, self._accounting
        if body.stream:
            await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
        open_ = set(range(len(self._texts)))
        while open_:
            await self._wake.wait()
            self._wake.clear()
            if disconnect.done():
                return
            for index in sorted(open_):
                last = index in self._ends
                end = (
                    self._ends[index]
                    if last
                    else model.num_output_tokens(self.job.id, index) + self._num_done
                )
                await self._send_tokens(index, end, last, send)
                if last:
                    open_.discard(index)
        if accounting is not None:
            accounting.num_cached_tokens = self._num_cached_tokens
        first, num_output_tokens = self._texts[0], sum(self._num_sent)
        if not body.stream:
            choices = [
                text.choice(num) for text, num in zip(self._texts, self._num_sent, strict=True)
            ]
            whole = first.whole(num_output_tokens, self._num_cached_tokens, choices)
            await reply(send, 200, whole)
            return
        if body.include_usage:
            await send_part(send, first.usage(num_output_tokens, self._num_cached_tokens))
        await send_part(send, b"data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_tokens(self, index: int, end: int, last: bool, send: Send) -> None:
        sent = self._num_sent[index]
        if end == sent:
            return
        self._num_sent[index] = end
        if (accounting := self._accounting) is not None:
            accounting.num_output_tokens += end - sent
            if new := range(max(sent, self._num_done) + 1, end + 1):
                ids = tuple(self._context.reply_id(number - self._num_done) for number in new)
                accounting.recorder.add_entry(
                    Entry(index, ids), is_streamed=bool(self._body.stream)
                )
        if not self._body.stream:
            return
        text = self._texts[index]
        events = [text.token(number, last and number == end) for number in range(sent + 1, end + 1)]
        if self._chat and not sent:
            events.insert(0, text.role)
        if accounting is not None:
            accounting.recorder.end_group()
        await send_part(send, b"".join(events))


def _token_ids(record: bytes) -> list[int]:
    """Return the tokens of a record's one sequence."""
    return [
        token for group in decode_groups(record) for entry in group for token in entry.token_ids
    ]
