"""When does an engine's replica start, stop and get replaced? The Ray Serve deployment of one."""

import asyncio
import dataclasses
import gc
import importlib
import logging
import os
from pathlib import Path

from ray import serve

from serving.cluster.engine_watch import EngineWatch
from serving.cluster.logs import use_log_level
from serving.cluster.loop_thread import LoopThread
from serving.cluster.nodes.private_network import private_network
from serving.cluster.processes import prefer_for_oom_kill
from serving.config import Config
from serving.engine.hardware_watch import watch_hardware
from serving.engine.step_log import StepLog
from serving.planning.bundled_model import prepare_bundled_model
from serving.planning.hardware import detect_hardware
from serving.planning.memory import growth_allowed
from serving.planning.plan import Plan
from serving.stream.engine import EngineFactory
from serving.stream.server import StreamServer

logger = logging.getLogger(__name__)


class EngineReplica:
    """Start the engine, offer its stream server to the gateways, exit when it fails.

    Requests never come through Ray: the gateways learn the server's address from
    `record_replica_metadata` and connect. Ray places, checks, restarts and drains.
    """

    async def __init__(self, config: Config, plan: Plan) -> None:  # type: ignore[misc]  # Serve awaits it
        prefer_for_oom_kill()  # before gateways: their memory is bounded, and they serve everybody
        self._config = config
        use_log_level(self._config.log)
        plan = await asyncio.to_thread(_with_model_here, plan)
        self._loop = LoopThread("engine")
        rank = serve.get_replica_context().rank
        self._server, address = await self._loop.run(
            _start_server(self._config, plan, plan.first_core + rank.local_rank)
        )
        self._metadata = {
            "host": address[0],
            "port": address[1],
            "secret": self._server.secret,
            "certificate": self._server.certificate,
        }
        # What exists by now stays: the garbage collector need not look at it while tokens wait.
        gc.collect()
        gc.freeze()
        max_growth_bytes = growth_allowed(
            self._config.engine, detect_hardware().num_ram_bytes, plan.num_replicas
        )
        watch = EngineWatch(
            self._config.engine, self._loop, self._server, max_growth_bytes, _exit_process
        )
        self._watch = asyncio.create_task(watch.run())
        telling = watch_hardware(self._server.tell_hardware, has_gpus=plan.device == "cuda")
        self._hardware = asyncio.ensure_future(self._loop.run(telling))

    async def record_replica_metadata(self) -> dict:
        """Return the server's address, secret and certificate; Ray tells the gateways."""
        return self._metadata

    async def check_health(self) -> None:
        """Raise `RuntimeError` once the engine can serve no more."""
        if self._server.engine.dead:
            raise RuntimeError("the engine is dead")

    async def __del__(self) -> None:
        # Serve drains only requests that came through it; the streams here are ours to drain.
        if hasattr(self, "_watch"):  # absent where `__init__` failed
            self._watch.cancel()
            self._hardware.cancel()
            await self._loop.run(_stop_server(self._server, self._config.engine.drain_timeout_s))


def _with_model_here(plan: Plan) -> Plan:
    """Return the plan with the bundled model on this node, which may be another than the plan's."""
    if not plan.uses_bundled_model or plan.model is None or Path(plan.model).is_dir():
        return plan
    return dataclasses.replace(plan, model=str(prepare_bundled_model()))


async def _start_server(
    config: Config, plan: Plan, local_rank: int
) -> tuple[StreamServer, tuple[str, int]]:
    """Start the engine and its stream server. Return the server and its address."""
    module, _, name = config.engine.factory.partition(":")
    factory: EngineFactory = getattr(importlib.import_module(module), name)
    engine = await factory.start(config, plan, local_rank)
    server = StreamServer(engine, config.gateway.stream_window_bytes)
    application = serve.get_replica_context().app_name
    network = await asyncio.to_thread(private_network, config, application)
    address = await server.listen(network.host, tls=network.tls, clients=network.clients)
    if (folder := config.engine.step_log) is not None:
        log = StepLog(engine, folder / f"{os.getpid()}.jsonl", server.on_step)
        engine.subscribe(log.on_step)
    return server, address


async def _stop_server(server: StreamServer, timeout_s: float) -> None:
    await server.drain(timeout_s)
    server.close()
    await server.engine.shutdown()


def _exit_process(reason: str) -> None:
    """End this replica at once; its gateways see their connections end."""
    logger.error("%s: the replica exits", reason)
    os._exit(1)
