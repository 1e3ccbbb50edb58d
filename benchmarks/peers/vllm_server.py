"""How do other routers reach a real vLLM engine? It is a server with the settings of Headway's.

    python -m benchmarks.peers.vllm_server --port 8001 --rank 0

vLLM's own scheduler, first come, first served, and vLLM's own OpenAI application, served by
uvicorn, without any part of Headway. On a CPU the engine is pinned to the core `--rank`.
`--settings stock` leaves vLLM's own step budget, block size and chunks. With
`--data-parallel-size N` it is what `vllm serve` does by that option: N engines, each on a core of
its own, and vLLM's balancer between them.
"""

import argparse
import dataclasses
import os
from typing import Any

import uvicorn
import uvloop

from serving.config import parse
from serving.engine.vllm.engine import on_core, vllm_arguments
from serving.planning.bundled_model import SERVED_MODEL_NAME, prepare_bundled_model
from serving.planning.hardware import detect_hardware
from serving.planning.plan import make_plan

# What Headway sets of how an engine schedules. The rest (data type, length of contexts, memory of
# the KV cache, no compilation) is needed to run at all, or to give right answers.
_OURS = ("max_num_batched_tokens", "long_prefill_token_threshold", "block_size")


async def serve(options: argparse.Namespace) -> None:
    """Serve until a signal ends it."""
    with on_core(options.rank):
        # vLLM is imported late: it reads the environment set here.
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        args = _arguments(options)
        llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs.from_cli_args(args), usage_context=UsageContext.OPENAI_API_SERVER
        )
    try:
        tasks = await llm.get_supported_tasks()
        app = build_app(args, tasks, llm.model_config)
        await init_app_state(llm, app.state, args, tasks)
        settings = uvicorn.Config(
            app, host="127.0.0.1", port=options.port, lifespan="off", log_level="warning"
        )
        await uvicorn.Server(settings).serve()
    finally:
        llm.shutdown()


def serve_data_parallel(options: argparse.Namespace) -> None:
    """Do what `vllm serve` does, whose command itself does not start in the build for CPUs."""
    os.environ["OMP_NUM_THREADS"] = "1"
    from vllm.entrypoints.cli.serve import ServeSubcommand

    from benchmarks.peers.pinned_executor import PinnedExecutor

    args = _arguments(options)
    args.host, args.port = "127.0.0.1", options.port
    args.data_parallel_size = options.data_parallel_size
    args.distributed_executor_backend = PinnedExecutor
    ServeSubcommand.cmd(args)


def _arguments(options: argparse.Namespace) -> Any:
    """Return vLLM's own argument namespace."""
    config = parse({"device": "cpu", "replicas": options.engines})
    plan = make_plan(config, detect_hardware())
    engine_args = plan.engine_args
    if options.settings == "stock":
        engine_args = {key: value for key, value in engine_args.items() if key not in _OURS}
    model = options.model or str(prepare_bundled_model())
    plan = dataclasses.replace(
        plan, model=model, served_model_name=SERVED_MODEL_NAME, engine_args=engine_args
    )
    args = vllm_arguments(plan)
    args.scheduling_policy = "fcfs"
    args.enable_logging_iteration_details = False
    return args


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--engines", type=int, default=2, help="how many share the memory")
    parser.add_argument("--settings", choices=("ours", "stock"), default="ours")
    parser.add_argument("--data-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument("--model", help="a folder; default: the bundled model")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if options.data_parallel_size > 1:
        serve_data_parallel(options)
    else:
        uvloop.run(serve(options))


if __name__ == "__main__":
    main()
