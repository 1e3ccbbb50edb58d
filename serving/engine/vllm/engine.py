"""How does one vLLM engine start, serve and end in this process?

Its application is vLLM's own FastAPI app, called in-process as ASGI: chat
templates, tools, structured output, logprobs, `n`, parsers and error replies
are vLLM's, whatever the version brings.
"""

import asyncio
import contextlib
import dataclasses
import logging
import os
import shutil
import traceback
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from starlette.routing import WebSocketRoute
from starlette.types import ASGIApp

from router import EngineInfo
from router.fleet.step_budget import ITL_TARGET_S
from serving.config import Config, ConfigError
from serving.engine.vllm import patches
from serving.engine.vllm.adapters.watch import WORKER, AdapterWatch
from serving.engine.vllm.lifeline import Lifeline
from serving.planning.plan import Plan
from serving.stream.accounting import RequestAccounting

logger = logging.getLogger(__name__)


_BODY_CHECKS = "fastapi.dependencies.utils"  # the module that has a request's body checked


class VllmEngine:
    """vLLM's `AsyncLLM` in this process, its EngineCore in a child process."""

    def __init__(
        self,
        llm: Any,
        app: ASGIApp,
        stats: Any,
        resumer: Any,
        info: EngineInfo,
        lifeline: Lifeline,
        grammars: Any,
    ) -> None:
        self.app = app
        self._info = info
        self.lifeline = lifeline
        self._llm = llm
        self.blocks = stats.blocks
        self.subscribe = stats.subscribe
        self.snapshot = stats.snapshot
        self._stats = stats
        self._resumer = resumer
        self._grammars = grammars
        self._aborts: set[asyncio.Task[None]] = set()  # kept until they are done

    @classmethod
    async def start(cls, config: Config, plan: Plan, local_rank: int) -> "VllmEngine":
        """Load the model, which takes from seconds to minutes. Return the engine, ready.

        Raises `ConfigError` for an unknown key in `engine.args` and for a vLLM that is not as
        expected; vLLM's own errors pass through.
        """
        if plan.device != "cpu":
            return await cls._start(config, plan)
        with on_core(local_rank):
            return await cls._start(config, plan)

    @classmethod
    async def _start(cls, config: Config, plan: Plan) -> "VllmEngine":
        # vLLM is imported late: it reads the environment set above.
        patches.check_vllm()
        import vllm
        from vllm.config import KVEventsConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import propagate_flash_late_interaction
        from vllm.sampling_params import SamplingParams
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        from serving.engine.vllm.grammar.grammars import Grammars
        from serving.engine.vllm.resume import Resumer
        from serving.engine.vllm.stats import EngineStats

        args = vllm_arguments(plan)
        engine_args = AsyncEngineArgs.from_cli_args(args)
        propagate_flash_late_interaction(args, engine_args)
        if engine_args.kv_events_config is None:
            # They come with the statistics of their step (`StatsMixin`), not by socket.
            engine_args.kv_events_config = KVEventsConfig(
                enable_kv_cache_events=True, publisher="null"
            )
        # vLLM chooses the step's budget and the most sequences by who uses the engine: unless told
        # that it serves, it gives a large GPU a quarter of the one and an eighth of the other.
        vllm_config = engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)
        scheduler = vllm_config.scheduler_config
        patches.set_scheduler(scheduler)
        itl_target_s = config.engine.itl_target_s
        if itl_target_s == "auto":
            itl_target_s = None if plan.device == "cpu" else ITL_TARGET_S
        itl_target_s = patches.set_itl_target(vllm_config, itl_target_s)
        stats = EngineStats(vllm_config)
        lifeline = Lifeline()
        with lifeline.offered():
            llm = AsyncLLM.from_vllm_config(
                vllm_config, stat_loggers=[lambda config, index: stats], disable_log_stats=True
            )
        lora_config = vllm_config.lora_config
        if lora_config and vllm_config.parallel_config.worker_extension_cls == WORKER:
            stats.adapters = await AdapterWatch.start(llm, lora_config)
        tasks = await llm.get_supported_tasks()
        if "generate" in tasks and (plan.device != "cpu" or _has_compiler()):
            await _warm_up(llm)
        core_backend = await _choose_grammar_backend(llm) if "generate" in tasks else ""
        stats.reset_steps()
        grammars = Grammars(
            vllm_config,
            config.engine,
            core_backend,
            lambda outputs: SamplingParams(structured_outputs=outputs)._validate_structured_outputs(
                llm.model_config, vllm_config.structured_outputs_config, llm.renderer.tokenizer
            ),
        )
        with _keeping_log_level():
            app = build_app(args, tasks, llm.model_config)
        await init_app_state(llm, app.state, args, tasks)
        if stats.adapters is not None:
            await stats.adapters.attach(app, stats.tell)
        refuse_unreadable_bodies(app)
        # Set by vLLM's launcher, which we are in place of: whoever answers for a request that
        # failed also sees to it that the server ends where the engine is dead. Ours ends anyway.
        app.state.server = SimpleNamespace(should_exit=False)
        outputs = llm.output_processor
        stats.attach(outputs.request_states)
        resumer = Resumer(outputs.process_outputs, outputs.request_states)
        patches.patch_modules()
        patches.watch_requests(outputs, stats, resumer)
        patches.admit_requests(llm, grammars, stats.adapters)
        patches.keep_responses(app.state)
        names = args.served_model_name or [args.model]
        loras = {module.name: module.path for module in args.lora_modules or ()}
        info = EngineInfo(
            model=names[0],
            aliases=(*names[1:], *loras),
            root=args.model,
            adapters=loras,
            max_loras=stats.adapters.max_loras if stats.adapters is not None else 0,
            routes=routes_of(app),
            tasks=tuple(tasks),
            max_model_len=llm.model_config.max_model_len,
            max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            max_prefill_chunk=scheduler.long_prefill_token_threshold,
            itl_target_s=itl_target_s,
            async_scheduling=bool(scheduler.async_scheduling),
            num_kv_tokens=stats.num_kv_tokens,
            block_size=vllm_config.cache_config.block_size,
            vocab_size=llm.model_config.get_vocab_size(),
            device=plan.device_name,
            engine=f"vllm {vllm.__version__}",
        )
        return cls(llm, app, stats, resumer, info, lifeline, grammars)

    @property
    def info(self) -> EngineInfo:
        """What it serves, with the adapters of now."""
        adapters = self._stats.adapters
        return self._info if adapters is None else self._info.with_adapters(adapters.paths)

    def forget(self, accounting: RequestAccounting) -> None:
        """Stop computing for a request that has ended, in whatever way."""
        left = self._stats.forget(accounting)
        self._resumer.forget(accounting)
        if left and not self.dead:
            # vLLM aborts what nobody listens to when its generator is closed. That of a response
            # which ended with an exception is closed only by the garbage collector.
            task = asyncio.get_running_loop().create_task(self._llm.abort(left, internal=True))
            self._aborts.add(task)
            task.add_done_callback(self._aborts.discard)

    @property
    def dead(self) -> bool:
        """Whether the engine can serve no more."""
        return self._llm.errored

    async def ping(self) -> None:
        """Return once the engine core has answered; never while it hangs."""
        await self._llm.is_sleeping()  # any question would do

    async def shutdown(self) -> None:
        """End the engine core: at once, as nothing runs any more, by force after a second."""
        await asyncio.to_thread(self._llm.shutdown, 1.0)
        self.lifeline.close()
        self._grammars.close()


@contextlib.contextmanager
def on_core(local_rank: int) -> Iterator[None]:
    """Keep an engine core that is started in the block on one CPU core, with one thread.

    It inherits affinity and thread count when spawned; OpenMP threads that share a core
    stretch steps up to 15-fold. Afterwards this process may use all its cores again.
    """
    os.environ.update(OMP_NUM_THREADS="1", VLLM_ENABLE_V1_MULTIPROCESSING="1")
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(cores)[local_rank % len(cores)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@contextlib.contextmanager
def _keeping_log_level() -> Iterator[None]:
    """Undo what is done to the level of all logs in the block.

    A library for a hosting service, which vLLM's application is made to fit, silences warnings.
    """
    kept: list[logging.Logger | logging.Handler] = [logging.root, *logging.root.handlers]
    levels = [each.level for each in kept]
    try:
        yield
    finally:
        for each, level in zip(kept, levels, strict=True):
            each.setLevel(level)


async def _warm_up(llm: Any) -> None:
    """Have vLLM compile what it compiles for the first sample and the first log probability.

    That takes seconds in the middle of a step, in which an engine would be taken for hung. One
    sequence, several, and each combination of top-k and top-p are compiled apart.
    """
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    kinds = [(1, 0, 1.0), (4, 0, 1.0), (1, 20, 0.9), (1, 20, 1.0), (1, 0, 0.9)]
    for number, (num_sequences, top_k, top_p) in enumerate(kinds):
        params = SamplingParams(
            n=num_sequences,
            temperature=1.0,
            top_k=top_k,
            top_p=top_p,
            max_tokens=4,
            ignore_eos=True,
            logprobs=1 if llm.model_config.max_logprobs else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        async for _ in llm.generate({"prompt_token_ids": [0, 1]}, params, f"warm-up-{number}"):
            pass


async def _choose_grammar_backend(llm: Any) -> str:
    """Have the core take the grammar compiler that it would usually take, and return its name.

    A core compiles all grammars with the one that its first grammar asked for, whichever that
    was. Engines of one model had better agree. Empty if it cannot have any.
    """
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams

    outputs = StructuredOutputsParams(json_object=True)
    params = SamplingParams(structured_outputs=outputs, max_tokens=1)
    try:
        async for _ in llm.generate({"prompt_token_ids": [0, 1]}, params, "first-grammar"):
            pass
    except Exception as error:
        logger.warning("structured output is not to be had: %s", error)
        return ""
    return outputs._backend or ""


def _has_compiler() -> bool:
    """Whether PyTorch can compile for the CPU; if not, ask for nothing that is compiled."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def vllm_arguments(plan: Plan) -> Any:
    """Return vLLM's own argument namespace: its defaults, then the plan's and the user's.

    Raises `ConfigError` for a key of `engine.args` that vLLM does not have.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs, make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    known = {
        field.name for cls in (AsyncEngineArgs, FrontendArgs) for field in dataclasses.fields(cls)
    }
    settings = {
        # Tokens per step, for `EngineStats`.
        "enable_logging_iteration_details": True,
        "enable_log_requests": False,
        # The waiting queue in the order of deadlines; equal priorities as they arrive.
        "scheduling_policy": "priority",
        "disable_fastapi_docs": True,
        **plan.engine_args,
    }
    if plan.device == "cpu":
        from serving.engine.vllm.cpu_executor import CpuExecutor

        settings.setdefault("distributed_executor_backend", CpuExecutor)
    if settings.get("enable_lora"):
        settings.setdefault("worker_extension_cls", WORKER)
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(f"engine.args.{key}: vLLM has no such engine argument")
        setattr(args, key, value)
    _prepare_parsers(args)
    args.lora_modules = _lora_modules(args.lora_modules)
    args.model = args.model_tag = str(plan.model)
    args.served_model_name = [plan.served_model_name, *plan.aliases]
    return args


def refuse_unreadable_bodies(app: Any) -> None:
    """Have vLLM's application answer 400 where its own checks of a body's fields break down.

    Some look into a field before they know that it is an object (`"structured_outputs": []`): an
    `AttributeError`, which vLLM takes for a fault of the server.
    """
    from vllm.entrypoints.serve.exception_handling.handlers.exception import exception_handler

    async def handle(request: Any, error: Exception) -> Any:
        frames = traceback.walk_tb(error.__traceback__)
        if any(frame.f_globals.get("__name__") == _BODY_CHECKS for frame, _ in frames):
            error = ValueError(f"The request body has a field of a wrong type: {error}")
        return await exception_handler(request, error)

    for kind in (AttributeError, LookupError, AssertionError, RecursionError):
        app.exception_handler(kind)(handle)
    # What vLLM adds for a hosting service has had it built already, with the handlers of then.
    app.middleware_stack = app.build_middleware_stack()


def _lora_modules(modules: Any) -> list[Any] | None:
    """Return adapters as vLLM's parser of arguments would: each NAME=PATH or an object of fields.

    Raises `ConfigError` for anything else.
    """
    from vllm.entrypoints.openai.models.protocol import LoRAModulePath

    if modules is None:
        return None
    try:
        return [
            LoRAModulePath(*each.split("=", 1)) if isinstance(each, str) else LoRAModulePath(**each)
            for each in modules
        ]
    except TypeError as error:
        raise ConfigError(
            f"engine.args.lora_modules: each has to be NAME=PATH or {{name: …, path: …}}: {error}"
        ) from error


def routes_of(app: Any) -> tuple[str, ...]:
    """Return what an application answers, each as "POST /v1/messages"; sockets as "WS …"."""
    found = set()
    left = list(app.routes)
    while left:
        route = left.pop()
        path = getattr(route, "path", None)
        if path is None:  # a newer FastAPI has routers among its routes
            left += getattr(route, "routes", None) or route.router.routes
        else:
            methods = getattr(route, "methods", None)
            if methods is None:
                methods = ("WS",) if isinstance(route, WebSocketRoute) else ("GET",)
            found |= {f"{method} {path}" for method in methods if method != "HEAD"}
    return tuple(sorted(found))


def _prepare_parsers(args: Any) -> None:
    """Do what vLLM's launcher does before it starts: load plug-ins, check the parsers' names.

    Raises `ConfigError`.
    """
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args
    from vllm.entrypoints.launchers.launcher import validate_api_server_args
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    try:
        if args.tool_parser_plugin:
            ToolParserManager.import_tool_parser(args.tool_parser_plugin)
        if args.reasoning_parser_plugin:
            ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
        validate_parsed_serve_args(args)
        validate_api_server_args(args)
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ConfigError(f"engine.args: {error.args[0] if error.args else error}") from error
