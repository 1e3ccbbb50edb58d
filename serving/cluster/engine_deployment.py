"""The Ray Serve deployment that owns one engine."""

import asyncio
import gc
import importlib
import logging
import os

import ray
from ray import serve

from serving.cluster.loop_thread import LoopThread
from serving.config import Config, parse
from serving.engine.step_log import StepLog
from serving.planning.plan import Plan
from serving.stream.engine import Engine
from serving.stream.server import StreamServer

logger = logging.getLogger(__name__)

_WATCH_INTERVAL_S = 0.25
_PING_INTERVAL_S = 1.0


class EngineReplica:
    """Starts the engine, offers its port to the gateways, watches over it.

    Requests never come through Ray: the gateways learn the port's address from
    `record_replica_metadata` and connect. Ray places, checks, restarts and drains.
    """

    async def __init__(self, args: dict, plan: Plan) -> None:  # type: ignore[misc]  # Serve awaits it
        self._config = parse(args)
        self._loop = LoopThread("engine")
        rank = serve.get_replica_context().rank
        self._port, address = await self._loop.run(_open(self._config, plan, rank.local_rank))
        self._metadata = {
            "host": address[0],
            "port": address[1],
            "secret": self._port.secret,
            "pid": os.getpid(),
        }
        # What lives from here on lives long: keep the collector off the token path.
        gc.collect()
        gc.freeze()
        self._watches = [
            asyncio.create_task(self._leave_with_the_engine()),
            asyncio.create_task(self._leave_when_hung()),
        ]

    async def record_replica_metadata(self) -> dict:
        """Return the port's address and secret; Ray hands them to the gateways."""
        return self._metadata

    async def check_health(self) -> None:
        """Raise `RuntimeError` once the engine can serve no more."""
        if self._port.engine.dead:
            raise RuntimeError("the engine is dead")

    async def _leave_with_the_engine(self) -> None:
        """Exit when the engine dies: Serve would route to us for 24 s more (measured)."""
        while not self._port.engine.dead:
            await asyncio.sleep(_WATCH_INTERVAL_S)
        os._exit(1)

    async def _leave_when_hung(self) -> None:
        """Exit when the engine core has not answered for long: Ray starts another one.

        It answers between its steps, so this looks at what no snapshot tells once
        the gateways have taken their requests off a hung engine: then it seems idle.
        """
        timeout_s = self._config.engine.hang_timeout_s
        while True:
            await asyncio.sleep(_PING_INTERVAL_S)
            try:
                await asyncio.wait_for(self._loop.run(self._port.engine.ping()), timeout_s)
            except TimeoutError:
                logger.error("the engine has not answered for %g s: leaving", timeout_s)
                os._exit(1)
            except Exception as error:  # it died: `_leave_with_the_engine` sees to that
                logger.warning("the engine does not answer: %s", error)

    async def __del__(self) -> None:
        # Serve drains only requests that it carried; the streams here are ours.
        if hasattr(self, "_watches"):
            for watch in self._watches:
                watch.cancel()
            await self._loop.run(_close(self._port, self._config.engine.drain_timeout_s))


async def _open(
    config: Config, plan: Plan, local_rank: int
) -> tuple[StreamServer, tuple[str, int]]:
    module, _, name = config.engine.factory.partition(":")
    factory: type[Engine] = getattr(importlib.import_module(module), name)
    engine = await factory.start(config, plan, local_rank)
    port = StreamServer(engine, config.gateway.stream_window_bytes)
    address = await port.listen(ray.util.get_node_ip_address())
    if (folder := config.engine.step_log) is not None:
        log = StepLog(engine, folder / f"{os.getpid()}.jsonl", port.on_step)
        engine.subscribe(log.on_step)
    return port, address


async def _close(port: StreamServer, timeout_s: float) -> None:
    await port.drain(timeout_s)
    port.close()
    await port.engine.shutdown()
