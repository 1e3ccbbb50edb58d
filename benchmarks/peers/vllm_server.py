"""How do other routers reach a real vLLM engine? It is a server with the settings of Headway's.

    python -m benchmarks.peers.vllm_server --port 8001 --rank 0

vLLM's own scheduler, first come, first served, and vLLM's own OpenAI application, served by
uvicorn, without any part of Headway. On a CPU the engine is pinned to the core `--rank`.
"""

import argparse
import dataclasses
import os

import uvicorn
import uvloop

from router.fleet.prefill_chunk import prefill_chunk_tokens
from serving.config import parse
from serving.engine.vllm.engine import on_core, vllm_arguments
from serving.planning.bundled_model import prepare_bundled_model
from serving.planning.hardware import detect_hardware
from serving.planning.plan import make_plan


async def serve(port: int, rank: int, num_engines: int) -> None:
    """Serve until a signal ends it."""
    with on_core(rank):
        # vLLM is imported late: it reads the environment set here.
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.v1.engine.async_llm import AsyncLLM

        config = parse({"device": "cpu", "replicas": num_engines})
        plan = dataclasses.replace(
            make_plan(config, detect_hardware()), model=str(prepare_bundled_model())
        )
        args = vllm_arguments(plan)
        args.scheduling_policy = "fcfs"
        args.enable_logging_iteration_details = False
        args.long_prefill_token_threshold = prefill_chunk_tokens(args.max_num_batched_tokens)
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(args))
    try:
        tasks = await llm.get_supported_tasks()
        app = build_app(args, tasks, llm.model_config)
        await init_app_state(llm, app.state, args, tasks)
        settings = uvicorn.Config(
            app, host="127.0.0.1", port=port, lifespan="off", log_level="warning"
        )
        await uvicorn.Server(settings).serve()
    finally:
        llm.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--engines", type=int, default=2, help="how many share the memory")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    uvloop.run(serve(options.port, options.rank, options.engines))


if __name__ == "__main__":
    main()
