"""What does our own path cost? An engine without a model leaves only the path to measure.

The null engine emits tokens on a clock. `engine.factory:
"benchmarks.systems.null_engine:NullEngine"` puts it in vLLM's place. As in vLLM, one iteration
of the event loop wakes every stream that the step advanced, and each stream is a task of its own
that writes one server-sent event per token. A response is the events that vLLM 0.32 writes: the
role, one event per token (the last with the finish reason), usage if asked for, `[DONE]`.

Two things differ on purpose. The first token is sent at once and not with the next step, so that
its time measures the path and not the phase of the clock. And a stream under back-pressure emits
later and does not merge tokens, so that events can be counted as tokens.

`python -m benchmarks.systems.null_engine --port PORT` serves the same application by uvicorn
alone: the floor that every path is compared with.
"""

import argparse
import asyncio
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
from starlette.types import Receive, Scope, Send

from benchmarks.systems.step_clock import StepClock
from router import EngineInfo, EngineSnapshot
from router.fleet.block_log import BlockLog
from serving.config import Config, ConfigError
from serving.engine.emulated.asgi import (
    EVENTS,
    error_content,
    read_body,
    reply,
    send_part,
    wait_for_disconnect,
)
from serving.engine.emulated.completion_text import CompletionText
from serving.stream.accounting import RequestAccounting, current_accounting

if TYPE_CHECKING:
    from serving.planning.plan import Plan

MODEL = "null-engine"
# Beyond what any benchmark needs: admission must never hold a request.
_NUM_KV_TOKENS = 2**30
_MAX_NUM_SEQS = 2**20
_MAX_STEP_TOKENS = 2**20
_PREFILL_TOKENS_PER_S = 1e7
# About what one token of English takes up in a request body.
_BYTES_PER_TOKEN = 4


class NullEngineArgs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`engine.args` of the null engine."""

    step_ms: float = 10.0  # between the tokens of a stream; 0: flat out, steps back to back
    tokens: int = 200  # of a response whose request sets no limit


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Body(msgspec.Struct):
    """What the null engine reads of a request; everything else is ignored."""

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = None
    null_engine_step_ms: float | None = None  # of this request; unset: the engine's


_decode_body = msgspec.json.Decoder(_Body).decode


class NullEngine:
    """The `Engine` without a model: an ASGI application and its counters."""

    def __init__(self, args: NullEngineArgs, model: str = MODEL) -> None:
        self.app = self._serve
        self.dead = False
        self.lifeline = None  # the event loop itself computes
        self.blocks = BlockLog()
        self.info = EngineInfo(
            model=model,
            tasks=("generate",),
            max_model_len=2**20,
            max_num_seqs=_MAX_NUM_SEQS,
            max_num_batched_tokens=_MAX_STEP_TOKENS,
            num_kv_tokens=_NUM_KV_TOKENS,
            block_size=16,
            device="none",
            engine="null engine (no model)",
        )
        self.num_running_reqs = 0
        self.num_output_tokens_total = 0
        self._args = args
        self._clocks: dict[float, StepClock] = {}  # by step time, ms
        self._on_step: Callable[[], None] = lambda: None
        self._ids = itertools.count()
        self._num_prefill_tokens_total = 0
        self._num_ended_tokens = 0  # prompt and output of requests that are over
        self._num_steps_total = 0
        self._step_s = 0.0
        self._step_num_decode_reqs = 0

    @classmethod
    async def start(cls, config: Config, plan: "Plan", local_rank: int) -> "NullEngine":
        """Return an engine, ready at once. Raises `ConfigError` for bad `engine.args`."""
        try:
            args = msgspec.convert(config.engine.args, NullEngineArgs)
        except msgspec.ValidationError as error:
            raise ConfigError(f"engine.args: {error}") from None
        return cls(args, plan.served_model_name)

    def subscribe(self, on_step: Callable[[], None]) -> None:
        """Have `on_step()` called on the event loop after every step, never while idle."""
        self._on_step = on_step

    def snapshot(self, seq: int, accountings: list[RequestAccounting]) -> EngineSnapshot:
        """Return the state now. Nothing is ever pending: a prompt takes no time here."""
        num_context = (
            self._num_prefill_tokens_total + self.num_output_tokens_total - self._num_ended_tokens
        )
        return EngineSnapshot(
            seq=seq,
            num_running_reqs=self.num_running_reqs,
            num_inflight_reqs=len(accountings),
            kv_cache_usage=num_context / _NUM_KV_TOKENS,
            num_free_kv_tokens=_NUM_KV_TOKENS - num_context,
            num_decoding_reqs=self.num_running_reqs,
            num_decode_context_tokens=num_context,
            prefill_tokens_per_s=_PREFILL_TOKENS_PER_S,
            step_s=self._step_s,
            step_num_decode_reqs=self._step_num_decode_reqs,
            num_prefill_tokens_total=self._num_prefill_tokens_total,
            num_output_tokens_total=self.num_output_tokens_total,
            num_steps_total=self._num_steps_total,
        )

    def forget(self, accounting: RequestAccounting) -> None:
        """Do nothing: nothing is kept per accounting."""

    async def ping(self) -> None:
        """Return at once: what computes here is the event loop itself."""

    async def shutdown(self) -> None:
        """Do nothing: nothing computes."""

    def _clock(self, step_ms: float) -> StepClock:
        if (clock := self._clocks.get(step_ms)) is None:
            clock = self._clocks[step_ms] = StepClock(step_ms / 1000, self._count_step)
        return clock

    def _count_step(self, step_s: float, num_streams: int) -> None:
        self._step_s, self._step_num_decode_reqs = step_s, num_streams
        self._num_steps_total += 1
        self._on_step()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path in ("/v1/chat/completions", "/v1/completions"):
            await self._complete(path == "/v1/chat/completions", receive, send)
        elif path == "/v1/models":
            model = {"id": self.info.model, "object": "model", "created": 0, "owned_by": "headway"}
            await reply(send, 200, {"object": "list", "data": [model]})
        elif path == "/health":
            await reply(send, 200, {})
        else:
            await reply(send, 404, error_content("Not Found", 404))

    async def _complete(self, chat: bool, receive: Receive, send: Send) -> None:
        body = await read_body(receive)
        if body is None:
            return
        try:
            request = _decode_body(body)
        except msgspec.MsgspecError as error:
            await reply(send, 400, error_content(str(error), 400))
            return
        await self._generate(request, len(body) // _BYTES_PER_TOKEN, chat, receive, send)

    async def _generate(
        self, request: _Body, num_prompt_tokens: int, chat: bool, receive: Receive, send: Send
    ) -> None:
        num_tokens = request.max_completion_tokens or request.max_tokens or self._args.tokens
        step_ms = request.null_engine_step_ms
        clock = self._clock(self._args.step_ms if step_ms is None else step_ms)
        text = CompletionText(chat, next(self._ids), self.info.model, num_prompt_tokens)
        accounting = current_accounting.get()
        if accounting is not None:
            accounting.entered, accounting.num_prompt_tokens = True, num_prompt_tokens
        self.num_running_reqs += 1
        self._num_prefill_tokens_total += num_prompt_tokens
        # A response that ends with its first token needs neither clock nor watch.
        watch = None
        num_sent = 0
        try:
            if request.stream:
                await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
                if chat:
                    await send_part(send, text.role)
            for number in range(1, num_tokens + 1):
                if number > 1:
                    if watch is None:
                        watch = asyncio.get_running_loop().create_task(wait_for_disconnect(receive))
                        clock.add_stream()
                    await clock.next_step()
                    if watch.done():
                        return
                num_sent = number
                self.num_output_tokens_total += 1
                if request.stream:
                    await send_part(send, text.token(number, number == num_tokens))
            if not request.stream:
                await reply(send, 200, text.whole(num_tokens))
                return
            if request.stream_options is not None and request.stream_options.include_usage:
                await send_part(send, text.usage(num_tokens))
            await send_part(send, b"data: [DONE]\n\n")
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if watch is not None:
                watch.cancel()
                clock.remove_stream()
            if accounting is not None:
                accounting.num_output_tokens = num_sent
            self.num_running_reqs -= 1
            self._num_ended_tokens += num_prompt_tokens + num_sent


def main() -> None:
    """Serve the null engine by uvicorn alone until a signal ends it."""
    import uvicorn

    parser = argparse.ArgumentParser(description="Serve the null engine by uvicorn alone.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--step-ms", type=float, default=10.0, help="0: flat out")
    options = parser.parse_args()
    engine = NullEngine(NullEngineArgs(step_ms=options.step_ms))
    uvicorn.run(
        engine.app,
        host=options.host,
        port=options.port,
        http="httptools",
        loop="uvloop",
        interface="asgi3",
        lifespan="off",
        access_log=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
