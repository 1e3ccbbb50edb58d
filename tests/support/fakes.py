"""Fakes that the tests of the shell share."""

import asyncio
from collections.abc import Callable
from typing import Self

import msgspec
from starlette.types import Receive, Scope, Send

from router.fleet.block_log import BlockLog
from router.types import EngineInfo, EngineSnapshot
from serving.config import Config
from serving.planning.plan import Plan
from serving.stream.accounting import RequestAccounting, current_accounting
from serving.stream.engine import Lifeline
from serving.stream.record import Entry

INFO = EngineInfo(
    model="fake-model",
    tasks=("generate",),
    max_model_len=32_768,
    max_num_seqs=64,
    max_num_batched_tokens=512,
    num_kv_tokens=100_000,
    block_size=16,
    engine="fake",
)


class FakeEngine:
    """Answers with as many chunks as `max_tokens` asks for; steps when told to.

    `gate` closed, no response goes on: tests see states that would be over at once. It
    closes by itself after the step `closes_at`.
    A `chunk` with `%d` in it is numbered; `status` is what every request is answered.
    """

    def __init__(self, info: EngineInfo = INFO) -> None:
        self.info = info
        self.blocks = BlockLog()
        self.gate = asyncio.Event()
        self.gate.set()
        self.closes_at = 0
        self.dead = False
        self.lifeline: Lifeline | None = None
        self.chunk = b"data: {}\n\n"
        self.end = b"data: [DONE]\n\n"
        self.headers = [(b"content-type", b"text/event-stream")]
        self.status = 200
        self.num_started = 0
        self.num_steps = 0
        self.num_cancelled = 0
        self.bodies: list[dict] = []
        self.adapter_paths: dict[str, str] | None = None  # of LoRA, by name; None: it takes none
        self._on_step: Callable[[], None] = lambda: None

    @classmethod
    async def start(cls, config: Config, plan: Plan, local_rank: int) -> Self:
        return cls()

    def subscribe(self, on_step: Callable[[], None]) -> None:
        self._on_step = on_step

    def snapshot(self, seq: int, accountings: list[RequestAccounting]) -> EngineSnapshot:
        return EngineSnapshot(
            seq=seq,
            num_running_reqs=len(accountings),
            num_inflight_reqs=len(accountings),
            num_free_kv_tokens=self.info.num_kv_tokens,
            num_steps_total=self.num_steps,
            adapter_paths=self.adapter_paths,
        )

    def forget(self, accounting: RequestAccounting) -> None:
        self._on_step()

    async def ping(self) -> None:
        await self.gate.wait()

    async def shutdown(self) -> None:
        self.dead = True

    @staticmethod
    def _record(token_id: int) -> None:
        """Count a chunk as a token that was generated."""
        if (accounting := current_accounting.get()) is not None:
            accounting.recorder.add_entry(Entry(0, (token_id,)), is_streamed=True)
            accounting.recorder.end_group()

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = msgspec.json.decode((await receive())["body"])
        self.bodies.append(body)
        self.num_started += 1
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        leaving = asyncio.ensure_future(receive())
        for number in range(body.get("max_tokens", 1)):
            opened = asyncio.ensure_future(self.gate.wait())
            await asyncio.wait({opened, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if leaving.done():
                opened.cancel()
                self.num_cancelled += 1
                return
            self.num_steps += 1
            self._record(number)
            chunk = self.chunk % number if b"%d" in self.chunk else self.chunk
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            if self.num_steps == self.closes_at:
                self.gate.clear()
        leaving.cancel()
        await send({"type": "http.response.body", "body": self.end})
