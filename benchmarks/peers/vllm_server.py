"""One real vLLM engine as a server of its own, with the settings that Headway gives its engines.

    python -m benchmarks.peers.vllm_server --port 8001 --rank 0

vLLM's own OpenAI application, served by uvicorn. `--rank` is the core that it
is pinned to on a CPU.
"""

import argparse
import asyncio
import dataclasses
import os

import uvicorn

from serving.config import parse
from serving.engine import VllmEngine
from serving.hardware import detect
from serving.onboard import onboard_model
from serving.plan import plan


async def serve(port: int, rank: int, num_engines: int) -> None:
    """Serve until a signal ends it."""
    config = parse({"device": "cpu", "replicas": num_engines})
    the_plan = dataclasses.replace(plan(config, detect()), model=str(onboard_model()))
    engine = await VllmEngine.start(config, the_plan, rank)
    settings = uvicorn.Config(
        engine.app, host="127.0.0.1", port=port, lifespan="off", log_level="warning"
    )
    try:
        await uvicorn.Server(settings).serve()
    finally:
        await engine.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--engines", type=int, default=2, help="how many share the memory")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    asyncio.run(serve(options.port, options.rank, options.engines))


if __name__ == "__main__":
    main()
