"""A real engine of the tiny model in a process of its own, watched as a replica is.

    python -m tests.serving.engine.liveness.engine_process CONFIG

Prints where it listens as a line of JSON. Ends with its standard input.
"""

import asyncio
import json
import os
import sys

from serving.cluster.engine_watch import EngineWatch
from serving.cluster.loop_thread import LoopThread
from serving.config import parse
from serving.engine.vllm.engine import VllmEngine
from serving.planning.hardware import detect_hardware
from serving.planning.plan import make_plan
from serving.stream.server import StreamServer


def main() -> None:
    config = parse(json.loads(sys.argv[1]))
    loop = LoopThread("engine")

    async def start() -> tuple[StreamServer, tuple[str, int]]:
        engine = await VllmEngine.start(config, make_plan(config, detect_hardware()), 0)
        server = StreamServer(engine, config.gateway.stream_window_bytes)
        return server, await server.listen("127.0.0.1")

    def exit_process(reason: str) -> None:
        print(json.dumps({"exits": reason}), flush=True)
        os._exit(1)

    async def serve() -> None:
        server, (host, port) = await loop.run(start())
        growth = config.engine.max_growth_bytes
        watch = EngineWatch(
            config.engine, loop, server, growth if isinstance(growth, int) else None, exit_process
        )
        task = asyncio.create_task(watch.run())
        member = {"host": host, "port": port, "secret": server.secret}
        core = server.engine.lifeline.pid if server.engine.lifeline is not None else 0
        print(json.dumps({"member": member, "core": core}), flush=True)
        await asyncio.to_thread(sys.stdin.read)
        task.cancel()
        await loop.run(server.engine.shutdown())

    asyncio.run(serve())


if __name__ == "__main__":
    main()
