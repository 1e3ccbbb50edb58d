"""Measures what a running engine's steps cost, from its own snapshots."""

import asyncio
import itertools
import json
from collections.abc import Callable
from typing import Any

from benchmarks.step_fit import Step
from router.types import EngineSnapshot
from serving.engine import Engine

_NUM_DECODE_STEPS = 24
_NUM_REPEATS = 3
_LARGEST_BATCH = 64
# A batch whose prompts alone take more steps than this would measure prefill.
_MAX_PREFILL_STEPS = 16
# Token ids to say nothing with: beyond the special ones, within every vocabulary.
_FIRST_ID, _NUM_IDS = 1000, 20_000


class StepProbe:
    """Sends an engine work of known shape and collects the steps that it takes.

    The engine must have nothing else to do.
    """

    def __init__(self, engine: Engine) -> None:
        self.steps: list[Step] = []
        self._engine = engine
        self._ids = itertools.count()
        self._last = engine.snapshot(0, [])
        # Prefilled in all before the one prompt that prefills; None: several may.
        self._num_before: int | None = None
        engine.subscribe(self._on_step)

    def plan(self) -> list[tuple[str, Callable[[], Any]]]:
        """Return what there is to measure: each its name, and what measures it."""
        info = self._engine.info
        budget = info.max_num_batched_tokens
        longest = min(info.max_model_len - 1, 4 * budget)
        jobs: list[tuple[str, Callable[[], Any]]] = [("warming up", lambda: self._batch(2, 32))]
        for context in sorted({32, min(1024, info.max_model_len // 4)}):
            batch = 1
            while (
                batch <= min(_LARGEST_BATCH, info.max_num_seqs)
                and batch * context <= _MAX_PREFILL_STEPS * budget
                and batch * (context + _NUM_DECODE_STEPS) <= info.num_kv_tokens // 2
            ):
                name = f"decoding {batch} × {context} tokens"
                jobs.append((name, lambda b=batch, c=context: self._batch(b, c)))
                batch *= 4
        sizes = [size for size in (1 << power for power in range(4, 20)) if size <= budget]
        jobs += [
            (f"prefilling {size} tokens", lambda size=size: self._prefills(size))
            for size in [*sizes, longest]
        ]
        return jobs

    async def _batch(self, num_requests: int, num_tokens: int) -> None:
        """Steps that decode: so many at once."""
        await asyncio.gather(
            *(self._ask(num_tokens, _NUM_DECODE_STEPS) for _ in range(num_requests))
        )

    async def _prefills(self, num_tokens: int) -> None:
        """Steps that prefill one prompt beside one that decodes.

        An engine that wakes up does not tell how long its first step took: the
        one that decodes keeps it awake.
        """
        companion = asyncio.create_task(self._ask(16, self._engine.info.max_model_len - 32))
        try:
            await self._until(lambda snapshot: snapshot.num_decoding_reqs == 1)
            for _ in range(_NUM_REPEATS):
                self._num_before = self._last.num_prefill_tokens_total
                await self._ask(num_tokens, 1)
                self._num_before = None
        finally:
            companion.cancel()
            await asyncio.gather(companion, return_exceptions=True)
            await self._until(lambda snapshot: not snapshot.num_running_reqs)

    def _on_step(self) -> None:
        last, now = self._last, self._engine.snapshot(0, [])
        self._last = now
        if now.num_steps_total != last.num_steps_total + 1 or not last.num_running_reqs:
            return
        if now.step_num_decode_reqs != last.num_decoding_reqs:
            return
        num_pairs = 0.0
        if num_tokens := now.step_num_prefill_tokens:
            if self._num_before is None:
                return
            num_computed = now.num_prefill_tokens_total - self._num_before
            num_pairs = num_tokens * (num_computed - num_tokens / 2)
        self.steps.append(
            Step(
                num_tokens,
                now.step_num_decode_reqs,
                last.num_decode_context_tokens,
                num_pairs,
                now.step_s,
            )
        )

    async def _until(self, condition: Callable[[EngineSnapshot], Any]) -> None:
        while not condition(self._engine.snapshot(0, [])):
            await asyncio.sleep(0.005)

    async def _ask(self, num_tokens: int, num_output_tokens: int) -> None:
        """Have a prompt answered that no other shares a block with."""
        number = next(self._ids)
        ids = [_FIRST_ID + (number * 7919 + each * each) % _NUM_IDS for each in range(num_tokens)]
        body = {
            "prompt": ids,
            "max_tokens": num_output_tokens,
            "ignore_eos": True,
            "stream": True,
        }
        asked = False
        status, parts = 0, []

        async def receive() -> dict[str, Any]:
            nonlocal asked
            if not asked:
                asked = True
                body_bytes = json.dumps(body).encode()
                return {"type": "http.request", "body": body_bytes, "more_body": False}
            await asyncio.Event().wait()
            raise AssertionError("never")

        async def send(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            if status != 200:
                parts.append(message.get("body", b""))

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 0),
            "server": ("127.0.0.1", 0),
        }
        await self._engine.app(scope, receive, send)
        if status != 200:
            raise RuntimeError(f"the engine refused a request: {b''.join(parts).decode()}")
