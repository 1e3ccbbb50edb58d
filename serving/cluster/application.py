"""The Ray Serve application: engines and gateways."""

import asyncio
import contextlib
import dataclasses
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from serving.cluster import discovery
from serving.cluster.budget_actor import ask_actor
from serving.cluster.engine_deployment import EngineReplica
from serving.cluster.loop_thread import LoopThread
from serving.config import Config, parse
from serving.gateway.app import Gateway
from serving.gateway.http.listener import Listener
from serving.gateway.providers.credentials import read_api_keys
from serving.gateway.tenants.keys import read_keys
from serving.planning.bundled_model import onboard_model
from serving.planning.hardware import detect
from serving.planning.plan import plan
from serving.renamed import current_args

# Admission is the router's; Serve's own limit must never bind.
_NO_LIMIT = 1_000_000


class OwnFrontGateway:
    """A gateway that listens by itself; Serve only places it and watches over it."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, args: dict, engines: DeploymentHandle
    ) -> None:
        config = parse(args)
        self._drain_timeout_s = config.engine.drain_timeout_s
        self._loop = LoopThread("gateway")
        self._gateway, self._listener = await self._loop.run(_open(config, engines))

    async def __del__(self) -> None:
        if hasattr(self, "_listener"):
            await self._loop.run(_close(self._gateway, self._listener, self._drain_timeout_s))


async def _open(config: Config, engines: DeploymentHandle) -> tuple[Gateway, Listener]:
    gateway = _make_gateway(config, engines)
    listener = Listener(gateway.app, config.gateway)
    await listener.start()
    return gateway, listener


async def _close(gateway: Gateway, listener: Listener, timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(listener.stop(), timeout_s)
    gateway.close()


def _make_gateway(config: Config, engines: DeploymentHandle) -> Gateway:
    """Return a gateway on the running loop that follows the engines' comings and goings."""
    context = serve.get_replica_context()
    # One gateway has its budgets for itself; several share them.
    ask = ask_actor(context.app_name) if config.gateway.replicas > 1 else None
    gateway = Gateway(config, context.replica_id.unique_id, ask)
    loop = asyncio.get_running_loop()
    discovery.subscribe(
        lambda members: loop.call_soon_threadsafe(gateway.driver.set_members, members)
    )
    engines._init()  # or Serve would tell of the replicas only at a first call
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
        if hasattr(self, "_gateway"):
            self._gateway.close()


def build(args: dict[str, Any]) -> serve.Application:
    """Return the application; `args` are those of `serving.config.Config`.

    Ray Serve calls this for `import_path: serving.cluster.application:build`. Raises
    `ConfigError` for a configuration that cannot work on this machine.
    """
    config = parse(args)
    args = current_args(args)  # what is deployed need not warn again
    if config.auth.keys_file is not None:
        read_keys(config.auth.keys_file)  # what is wrong with it shows before engines start
    for provider in config.providers:
        read_api_keys(provider)
    the_plan = plan(config, detect())
    if the_plan.uses_model_on_board:
        the_plan = dataclasses.replace(the_plan, model=str(onboard_model()))
    engines = serve.deployment(
        name="Engine",
        num_replicas=the_plan.num_replicas,
        ray_actor_options=the_plan.engine_actor_options,
        max_ongoing_requests=_NO_LIMIT,
        graceful_shutdown_timeout_s=config.engine.drain_timeout_s + 10,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=2,
        health_check_timeout_s=15,  # a stopped process is killed and started anew
        request_router_config=RequestRouterConfig(
            request_router_class="serving.cluster.discovery:EngineDirectory"
        ),
    )(EngineReplica)
    gateway = serve.deployment(
        name="Gateway",
        num_replicas=config.gateway.replicas,
        ray_actor_options=the_plan.gateway_actor_options,
        max_ongoing_requests=_NO_LIMIT,
        graceful_shutdown_timeout_s=config.engine.drain_timeout_s + 10,
        graceful_shutdown_wait_loop_s=0.1,
    )(OwnFrontGateway if config.gateway.front == "own" else serve.ingress(None)(ServedGateway))
    return gateway.bind(args, engines.bind(args, the_plan))
