"""Which requests make an engine's steps measurable? Work of known shape for a whole service."""

import asyncio
import itertools
import json
import random
from collections.abc import Awaitable, Callable
from functools import partial

from router import EngineInfo
from serving.capacity.client import ApiRequest, Client
from serving.capacity.launch import MeasureError
from serving.capacity.service import Service

_NUM_DECODE_STEPS = 24
_NUM_REPEATS = 3
_SHORTEST_TOKENS = 16
_NUM_SHORT_REPEATS = 16  # the shortest prompts tell the time outside of steps
# Longer than a step or two: a prompt that is sent as soon as another one has ended arrives just
# after the beginning of a step, and waits for all of it.
_MAX_PAUSE_S = 0.2
_LARGEST_BATCH = 64
# A batch whose prompts alone take more steps than this would measure prefill.
_MAX_PREFILL_STEPS = 16
_TIMEOUT_S = 600.0
# Token ids of meaningless prompts: above the special ones, within every vocabulary.
_FIRST_ID, _NUM_IDS = 1000, 20_000

Job = Callable[[], Awaitable[None]]


class StepProbe:
    """Sends every engine the same requests.

    The service must have no other requests and use the policy `round_robin`: as many requests at a
    time as there are engines then give each engine one.
    """

    def __init__(self, service: Service, info: EngineInfo) -> None:
        # Of prompts that one step prefills: their tokens, and the time to first token, seconds.
        self.firsts: list[tuple[int, float]] = []
        self._service = service
        self._info = info
        self._num_engines = service.num_engines
        self._numbers = itertools.count()  # of calls
        self._rng = random.Random(0)

    def plan(self) -> list[tuple[str, Job]]:
        """Return the jobs to run, each with its name."""
        info = self._info
        budget = info.max_num_batched_tokens
        longest = min(info.max_model_len - 1, 4 * budget)
        jobs: list[tuple[str, Job]] = []
        for context in sorted({32, min(1024, info.max_model_len // 4)}):
            batch = 1
            while (
                batch <= min(_LARGEST_BATCH, info.max_num_seqs)
                and batch * context <= _MAX_PREFILL_STEPS * budget
                and batch * (context + _NUM_DECODE_STEPS) <= info.num_kv_tokens // 2
            ):
                for num_busy in sorted({1, self._num_engines}):
                    name = f"{num_busy} decoding {batch} × {context} tokens"
                    jobs.append((name, partial(self.decode, batch, context, num_busy)))
                batch *= 4
        powers = (_SHORTEST_TOKENS << power for power in range(16))
        sizes = [size for size in powers if size <= budget]
        jobs += [
            (f"prefilling {size} tokens", partial(self._prefill, size))
            for size in [*sizes, longest]
        ]
        return jobs

    async def decode(self, num_requests: int, num_tokens: int, num_busy: int) -> None:
        """Have `num_busy` engines decode `num_requests` each; the others have little to do."""
        async with Client(self._service.urls) as client:
            for _ in range(num_requests):
                for number in range(self._num_engines):
                    num_output_tokens = _NUM_DECODE_STEPS if number < num_busy else 1
                    client.send(self._call(num_tokens, num_output_tokens))
            await client.wait(_TIMEOUT_S)
        await self._service.wait_until_idle(_TIMEOUT_S)

    async def _prefill(self, num_tokens: int) -> None:
        """Have every engine prefill one prompt beside a sequence that decodes.

        An idle engine does not report how long its first step took: the sequence that decodes
        keeps it busy.
        """
        async with Client(self._service.urls) as companions, Client(self._service.urls) as client:
            kept = [
                companions.send(self._call(16, self._info.max_model_len - 32))
                for _ in range(self._num_engines)
            ]
            while not all(record.num_events for record in kept):
                if errors := [record.error for record in kept if record.error]:
                    raise MeasureError(f"an engine refused a request: {errors[0]}")
                await asyncio.sleep(0.005)
            records = []
            is_shortest = num_tokens == _SHORTEST_TOKENS
            for _ in range(_NUM_SHORT_REPEATS if is_shortest else _NUM_REPEATS):
                await asyncio.sleep(self._rng.uniform(0.0, _MAX_PAUSE_S))
                for _ in range(self._num_engines):
                    records.append(client.send(self._call(num_tokens, 1)))
                await client.wait(_TIMEOUT_S)
            if num_tokens <= (self._info.max_prefill_chunk or self._info.max_num_batched_tokens):
                self.firsts += [(num_tokens, record.ttft_s) for record in records]
        await self._service.wait_until_idle(_TIMEOUT_S)

    def _call(self, num_tokens: int, num_output_tokens: int) -> ApiRequest:
        """Return a streamed completion request; its output has exactly so many tokens.

        No two of them share a block of their prompts.
        """
        number = next(self._numbers)
        ids = [_FIRST_ID + (number * 7919 + each * each) % _NUM_IDS for each in range(num_tokens)]
        body = {
            "model": self._info.model,
            "prompt": ids,
            "max_tokens": num_output_tokens,
            "ignore_eos": True,
            "stream": True,
        }
        return ApiRequest("/v1/completions", json.dumps(body).encode(), stream=True)
