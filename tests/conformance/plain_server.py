"""Plain vLLM, without any part of Headway in what it serves: `vllm serve` for builds for CPUs."""

import asyncio
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvicorn

from serving.engine.vllm.engine import on_core, vllm_arguments
from serving.planning.hardware import detect_hardware

_KV_CACHE_BYTES = 512 * 2**20


async def serve(
    model: str, names: list[str], port: int, args: dict[str, Any], core: int = 0
) -> None:
    """Serve until a signal ends it; on a CPU its engine is pinned to this core."""
    plan: Any = SimpleNamespace(
        device="cpu" if not detect_hardware().gpus else "cuda",
        engine_args={"dtype": "bfloat16", "kv_cache_memory_bytes": _KV_CACHE_BYTES, **args},
        model=Path(model),
        served_model_name=names[0],
        aliases=tuple(names[1:]),
    )
    with on_core(core):
        # vLLM is imported late: it reads the environment set here.
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = vllm_arguments(plan)
        llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs.from_cli_args(arguments), usage_context=UsageContext.OPENAI_API_SERVER
        )
    try:
        tasks = await llm.get_supported_tasks()
        app = build_app(arguments, tasks, llm.model_config)
        await init_app_state(llm, app.state, arguments, tasks)
        settings = uvicorn.Config(
            app, host="127.0.0.1", port=port, lifespan="off", log_level="warning"
        )
        await uvicorn.Server(settings).serve()
    finally:
        llm.shutdown()


if __name__ == "__main__":
    asyncio.run(serve(**json.loads(sys.argv[1])))
