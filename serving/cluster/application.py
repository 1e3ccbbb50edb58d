"""Which Ray Serve deployments make up the application, and how does each gateway start?"""

import asyncio
import contextlib
import dataclasses
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from serving.cluster import discovery
from serving.cluster.engine_deployment import EngineReplica
from serving.cluster.lease_actor import actor_sender
from serving.cluster.loop_thread import LoopThread
from serving.config import Config, parse
from serving.gateway.app import Gateway
from serving.gateway.http.listener import Listener
from serving.gateway.providers.credentials import read_api_keys
from serving.gateway.tenants.keys import read_keys
from serving.planning.bundled_model import prepare_bundled_model
from serving.planning.hardware import detect_hardware
from serving.planning.plan import make_plan
from serving.renamed import current_args

# The router decides on admission; Serve's own limit must never apply.
_NO_LIMIT = 1_000_000


class OwnFrontGateway:
    """A gateway with its own HTTP listener; Serve only places it and checks its health."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, args: dict, engines: DeploymentHandle
    ) -> None:
        config = parse(args)
        self._drain_timeout_s = config.engine.drain_timeout_s
        self._loop = LoopThread("gateway")
        self._gateway, self._listener = await self._loop.run(_open_gateway(config, engines))

    async def __del__(self) -> None:
        if hasattr(self, "_listener"):  # absent where `__init__` failed
            await self._loop.run(
                _close_gateway(self._gateway, self._listener, self._drain_timeout_s)
            )


async def _open_gateway(config: Config, engines: DeploymentHandle) -> tuple[Gateway, Listener]:
    gateway = _make_gateway(config, engines)
    listener = Listener(gateway.app, config.gateway)
    await listener.start()
    return gateway, listener


async def _close_gateway(gateway: Gateway, listener: Listener, timeout_s: float) -> None:
    """Let open responses finish for up to `timeout_s`, then close."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(listener.stop(), timeout_s)
    gateway.close()


def _make_gateway(config: Config, engines: DeploymentHandle) -> Gateway:
    """Return a gateway on the running loop that hears of every change of the engines."""
    context = serve.get_replica_context()
    # A single gateway keeps its limits itself; several share them.
    send_update = actor_sender(context.app_name) if config.gateway.replicas > 1 else None
    gateway = Gateway(config, context.replica_id.unique_id, send_update)
    loop = asyncio.get_running_loop()
    discovery.subscribe(
        lambda members: loop.call_soon_threadsafe(gateway.driver.engines.set_members, members)
    )
    engines._init()  # else Serve would report the replicas only at the first call
    return gateway


class ServedGateway:
    """A gateway behind Serve's HTTP front end: HAProxy, or Serve's own proxy."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, args: dict, engines: DeploymentHandle
    ) -> None:
        self._gateway = _make_gateway(parse(args), engines)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._gateway.app

    async def __del__(self) -> None:
        if hasattr(self, "_gateway"):  # absent where `__init__` failed
            self._gateway.close()


def build(args: dict[str, Any]) -> serve.Application:
    """Return the application; `args` are those of `serving.config.Config`.

    Ray Serve calls this for `import_path: serving.cluster.application:build`. Raises
    `ConfigError` for a configuration that cannot work on this machine.
    """
    config = parse(args)
    args = current_args(args)  # what is deployed need not warn again
    if config.auth.keys_file is not None:
        read_keys(config.auth.keys_file)  # an error in it shows before engines start
    for provider in config.providers:
        read_api_keys(provider)
    plan = make_plan(config, detect_hardware())
    if plan.uses_bundled_model:
        plan = dataclasses.replace(plan, model=str(prepare_bundled_model()))
    engines = serve.deployment(
        name="Engine",
        num_replicas=plan.num_replicas,
        ray_actor_options=plan.engine_actor_options,
        max_ongoing_requests=_NO_LIMIT,
        graceful_shutdown_timeout_s=config.engine.drain_timeout_s + 10,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=2,
        health_check_timeout_s=15,  # then a stopped process is killed and started again
        request_router_config=RequestRouterConfig(
            request_router_class="serving.cluster.discovery:EngineDirectory"
        ),
    )(EngineReplica)
    gateway = serve.deployment(
        name="Gateway",
        num_replicas=config.gateway.replicas,
        ray_actor_options=plan.gateway_actor_options,
        max_ongoing_requests=_NO_LIMIT,
        graceful_shutdown_timeout_s=config.engine.drain_timeout_s + 10,
        graceful_shutdown_wait_loop_s=0.1,
    )(OwnFrontGateway if config.gateway.front == "own" else serve.ingress(None)(ServedGateway))
    return gateway.bind(args, engines.bind(args, plan))
