"""How does an engine without a GPU answer requests?

By vLLM's scheduler and a profile's step times, behind the real stream.
`engine.factory: "serving.engine.emulated.engine:EmulatedEngine"` uses it in place of vLLM;
`engine.args.profile` names the hardware. Requests queue, prefill in chunks, share prefixes, decode
in one batch and are preempted as in vLLM, in real time. Only the replies are made up
(`serving.engine.emulated.text`): every engine gives a prompt the same reply, and a prompt that ends
with the first part of such a reply the rest of it.
"""

import asyncio
import itertools
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
from starlette.types import Receive, Scope, Send

from router import EngineSnapshot
from router.fleet.step_budget import ITL_TARGET_S
from router.simulation.engine.model import EngineModel
from router.simulation.engine.sequence import Progress
from serving.capacity.profiles import DEFAULT_PROFILE, ProfileError, load_profile
from serving.config import Config, ConfigError
from serving.engine.emulated.asgi import (
    error_content,
    read_body,
    reply,
    wait_for_disconnect,
)
from serving.engine.emulated.clock import EngineClock
from serving.engine.emulated.metrics import render
from serving.engine.emulated.request import Body, parse
from serving.engine.emulated.response import EmulatedResponse
from serving.stream.accounting import RequestAccounting, current_accounting

if TYPE_CHECKING:
    from serving.engine.emulated.kv_events import KvEvents  # needs pyzmq, which comes with vLLM
    from serving.planning.plan import Plan


class EmulatedArgs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`engine.args` of an emulated engine."""

    profile: str = DEFAULT_PROFILE  # a file's path, or a name in serving/capacity/profiles
    tokens: int = 200  # output of a request that sets no limit
    seed: int = 0  # of the noise on step times; each engine adds its rank
    prefill_chunk: int | None = None  # the profile's `max_prefill_chunk`
    max_num_batched_tokens: int | None = None  # likewise
    priority: bool = True  # a waiting queue by priority, as Headway configures its engines
    # Steps prefill as by `serving.engine.vllm.scheduler`, which keeps them short; None: as by
    # vLLM alone.
    itl_target_s: float | None = ITL_TARGET_S


class EmulatedEngine:
    """A `serving.stream.engine.Engine` without a model."""

    def __init__(
        self,
        args: EmulatedArgs,
        model: str | None = None,
        rank: int = 0,
        aliases: tuple[str, ...] = (),
    ) -> None:
        """`rank` makes the noise its own. Raises `ProfileError` if the profile cannot be read."""
        profile = load_profile(args.profile)
        changed = {
            "max_prefill_chunk": args.prefill_chunk,
            "max_num_batched_tokens": args.max_num_batched_tokens,
        }
        changed = {name: value for name, value in changed.items() if value is not None}
        profile = profile.model_copy(update=changed)
        self.model = EngineModel(
            profile,
            random.Random(f"{args.seed} {rank}"),
            priority=args.priority,
            itl_target_s=args.itl_target_s,
        )
        self.info = msgspec.structs.replace(
            self.model.info,
            model=model or profile.model,
            aliases=aliases,
            root=profile.model,
            engine=f"emulated ({self.model.info.engine})",
        )
        self.app = self._serve
        self.dead = False
        self.lifeline = None  # the event loop itself computes
        self.blocks = self.model.blocks
        self.kv_events: KvEvents | None = None  # to publish them, set it before the first request
        self.clock = EngineClock(self.model, self._on_model_step)
        self._args = args
        self._responses: dict[str, EmulatedResponse] = {}
        self._ids = itertools.count()
        self._on_step: Callable[[], None] = lambda: None

    @classmethod
    async def start(cls, config: Config, plan: "Plan", local_rank: int) -> "EmulatedEngine":
        """Return an engine that is ready. Raises `ConfigError` for bad `engine.args`."""
        try:
            args = msgspec.convert(config.engine.args, EmulatedArgs)
            return cls(args, plan.served_model_name, local_rank, plan.aliases)
        except (msgspec.ValidationError, ProfileError) as error:
            raise ConfigError(f"engine.args: {error}") from None

    def subscribe(self, on_step: Callable[[], None]) -> None:
        """Have `on_step()` called on the event loop after every step, never while idle."""
        self._on_step = on_step

    def snapshot(self, seq: int, accountings: list[RequestAccounting]) -> EngineSnapshot:
        """Return the state now; requests not yet in the scheduler count by their estimates."""
        snapshot = self.model.snapshot(seq, 0)
        chunk = self.info.max_prefill_chunk or self.info.max_num_batched_tokens
        estimates = [
            max(1, accounting.num_prompt_tokens - accounting.num_expected_cached_tokens)
            for accounting in accountings
            if not accounting.entered
        ]
        return msgspec.structs.replace(
            snapshot,
            num_inflight_reqs=len(accountings),
            num_pending_prefill_tokens=snapshot.num_pending_prefill_tokens + sum(estimates),
            num_step_demand_tokens=snapshot.num_step_demand_tokens
            + sum(min(estimate, chunk) for estimate in estimates),
        )

    def forget(self, accounting: RequestAccounting) -> None:
        """Do nothing, for nothing is kept per accounting. Part of the protocol."""

    async def ping(self) -> None:
        """Return at once: the event loop is what answers. Part of the protocol."""

    async def shutdown(self) -> None:
        """Take no further step."""
        self.clock.stop()

    def _on_model_step(self, progress: list[Progress]) -> None:
        for each in progress:
            if (response := self._responses.get(each.job_id)) is not None:
                response.on_progress(each)
        for response in self._responses.values():
            response.on_step()
        self._on_step()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path in ("/v1/chat/completions", "/v1/completions"):
            await self._complete(path == "/v1/chat/completions", receive, send)
        elif path == "/v1/models":
            model = {
                "id": self.info.model,
                "object": "model",
                "created": 0,
                "owned_by": "headway",
                "max_model_len": self.info.max_model_len,
            }
            await reply(send, 200, {"object": "list", "data": [model]})
        elif path == "/health":
            await reply(send, 200, {})
        elif path == "/metrics":
            await reply(send, 200, render(self.model, self.info.model), b"text/plain")
        else:
            await reply(send, 404, error_content("Not Found", 404))

    async def _complete(self, chat: bool, receive: Receive, send: Send) -> None:
        raw = await read_body(receive)
        if raw is None:
            return
        try:
            body = parse(raw)
            if body.model not in (None, self.info.model, *self.info.aliases):
                error = f"The model `{body.model}` does not exist."
                await reply(send, 404, error_content(error, 404))
                return
            response = self._submit(body, chat)
        except ValueError as error:
            await reply(send, 400, error_content(str(error), 400))
            return
        disconnect = asyncio.get_running_loop().create_task(wait_for_disconnect(receive))
        disconnect.add_done_callback(lambda _: response.on_disconnect())
        try:
            await response.send_all(self.model, disconnect, send)
        finally:
            disconnect.cancel()
            del self._responses[response.job.id]
            if self.kv_events is not None:
                self.kv_events.remove_request(response.job.block_hashes)
            self.clock.abort(response.job.id)

    def _submit(self, body: Body, chat: bool) -> EmulatedResponse:
        """Queue the request; return its response. Raises `ValueError` for one that cannot fit."""
        prompt = body.parse_prompt(chat)
        if prompt.num_tokens >= self.info.max_model_len:
            raise ValueError(
                f"This model's maximum context length is {self.info.max_model_len} tokens. "
                f"However, your prompt has {prompt.num_tokens} tokens."
            )
        accounting = current_accounting.get()
        asked = body.max_completion_tokens or body.max_tokens or self._args.tokens
        response = EmulatedResponse(
            str(next(self._ids)),
            body,
            prompt,
            chat,
            self.info.model,
            min(asked, self.info.max_model_len - prompt.num_tokens),
            self.info.block_size,
            accounting,
        )
        self.clock.add(response.job)
        self._responses[response.job.id] = response
        if self.kv_events is not None:
            self.kv_events.add_request(prompt, response.job.block_hashes)
        if accounting is not None:
            accounting.entered, accounting.num_prompt_tokens = True, prompt.num_tokens
            if accounting.on_prompt is not None:
                accounting.on_prompt(prompt.num_tokens, list(response.job.block_hashes))
                accounting.on_prompt = None
        return response
