"""Which Ray Serve deployments make up the application, and how does each gateway start?"""

import asyncio
import dataclasses
import gc
import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import msgspec
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from serving.cluster import discovery
from serving.cluster.actors.application_scaling import ScaledModel
from serving.cluster.actors.lease_actor import actor_sender
from serving.cluster.actors.scaling_actor import follow_orders, serve_options
from serving.cluster.engine_deployment import EngineReplica
from serving.cluster.logs import use_log_level
from serving.cluster.loop_thread import LoopThread
from serving.cluster.nodes.planned import plan_application
from serving.cluster.nodes.private_network import private_network, shown_to
from serving.cluster.processes import call_when_parent_ends
from serving.config import Config, parse
from serving.config.renamed import current_args
from serving.gateway.app import Gateway
from serving.gateway.http.front import Front
from serving.gateway.http.listener import Listener
from serving.gateway.intake.served_models import ModelEntry
from serving.planning.bundled_model import prepare_bundled_model
from serving.planning.plan import Plan
from serving.planning.service.service_plan import ServicePlan, scaling_of, served_names

# The router decides on admission; Serve's own limit must never apply.
_NO_LIMIT = 1_000_000
# A gateway that hangs or is stopped has to be replaced within ten seconds, for a stopped one keeps
# the connections that the kernel gives it. Serve believes three checks in a row.
_HEALTH_PERIOD_S = 1.0
_HEALTH_TIMEOUT_S = 2.0
_LOOP_TIMEOUT_S = 1.8  # for an event loop to take its turn
_LAST_WORDS_S = 1.0  # for error events to be written
_MEET_S = 1.0  # for other gateways to tell what is in force
_FAILURES_S = 3.0  # between two looks at what has become of models without an engine

# Keys that gateways need not start anew for where there are several models.
OF_MODELS = ("models", "engine", "replicas", "idle_sleep_s", "tensor_parallel_size")

logger = logging.getLogger(__name__)


class _Models:
    """Which models a gateway serves, as the application says, and which of them cannot start."""

    def __init__(self, gateway: Gateway, application: str) -> None:
        self._gateway = gateway
        self._application = application
        self._handles: dict[str, DeploymentHandle] = {}  # by deployment

    def follow(self, handle: DeploymentHandle) -> None:
        """Have Serve tell this process of a deployment's replicas."""
        self._handles[handle.deployment_name] = handle
        handle._init()  # else Serve would report the replicas only at the first call

    async def use(self, content: dict[str, Any]) -> None:
        """Go by the models that `_told` has made known."""
        entries = msgspec.convert(content["models"], list[ModelEntry])
        self._gateway.use_models(entries)
        for entry in entries:
            if entry.deployment not in self._handles:
                self.follow(serve.get_deployment_handle(entry.deployment, self._application, False))

    async def watch_failures(self) -> None:
        """Tell the gateway which models cannot start, while there are any without an engine."""
        models = self._gateway.served_models
        while True:
            await asyncio.sleep(_FAILURES_S)
            try:
                # A single one's requests wait: there is nothing else to serve.
                if len(models.configured) > 1 and models.without_engine():
                    failed = await asyncio.to_thread(discovery.start_failures, self._application)
                    self._gateway.use_failures(failed)
            except Exception:  # they are only held, as those of a model that starts are
                logger.exception("Ray Serve does not say which models could not be started")


class OwnFrontGateway:
    """A gateway with its own HTTP listener; Serve only places it and checks its health."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, args: dict, engines: Sequence[DeploymentHandle], served_names: tuple[str, ...]
    ) -> None:
        config = parse(args)
        self._drain_timeout_s = max(each.engine.drain_timeout_s for each in config.by_model())
        self._loop = LoopThread("gateway")
        self._gateway, self._models, self._listeners = await self._loop.run(
            _open_gateway(config, engines, served_names)
        )
        # What exists by now stays: the garbage collector need not look at it while tokens wait.
        gc.collect()
        gc.freeze()
        call_when_parent_ends(self._exit)

    async def reconfigure(self, content: dict[str, Any]) -> None:
        """Go by other models. Serve calls it at the start, and when they have changed."""
        await self._loop.run(self._models.use(content))

    async def record_replica_metadata(self) -> dict:
        """Return how other gateways reach this one; Ray tells them. Empty if it is alone."""
        return _peer_metadata(self._gateway)

    async def check_health(self) -> None:
        """Raise `TimeoutError` if the gateway's event loop hangs, which Serve's does not show."""
        async with asyncio.timeout(_LOOP_TIMEOUT_S):
            await self._loop.run(asyncio.sleep(0))

    def _exit(self) -> NoReturn:
        """Leave, for there is no Ray any more. What is open ends with an error event."""
        asyncio.run(self._loop.run(_close_gateway(self._gateway, self._listeners, 0.0)))
        os._exit(1)

    async def __del__(self) -> None:
        if hasattr(self, "_listeners"):  # absent where `__init__` failed
            await self._loop.run(
                _close_gateway(self._gateway, self._listeners, self._drain_timeout_s)
            )


async def _open_gateway(
    config: Config, engines: Sequence[DeploymentHandle], served_names: tuple[str, ...]
) -> tuple[Gateway, _Models, list[Listener]]:
    gateway, models = await _make_gateway(config, engines, served_names)
    listener = Listener(gateway.app, config.gateway)
    await listener.start()
    return gateway, models, [listener, *await _open_own_listeners(gateway)]


def _peer_metadata(gateway: Gateway) -> dict:
    peers = gateway.together.peers
    return {} if peers is None else peers.metadata


async def _open_own_listeners(gateway: Gateway) -> list[Listener]:
    """Open the gateway's own port, if it has one."""
    if not gateway.metrics_port:
        return []
    listener = Listener(gateway.own_app, gateway.config.gateway, gateway.metrics_port)
    await listener.start()
    return [listener]


async def _close_gateway(gateway: Gateway, listeners: list[Listener], timeout_s: float) -> None:
    """Let open responses finish for up to `timeout_s`; end the others with an error event."""
    gateway.close_feeds()
    stopping = asyncio.ensure_future(_stop_listeners(listeners))
    await asyncio.wait([stopping], timeout=timeout_s)
    gateway.close()
    await asyncio.wait([stopping], timeout=_LAST_WORDS_S)


async def _stop_listeners(listeners: list[Listener]) -> None:
    for listener in listeners:  # its own last: what is drained can be seen there
        await listener.stop()


async def _make_gateway(
    config: Config, engines: Sequence[DeploymentHandle], served_names: tuple[str, ...]
) -> tuple[Gateway, _Models]:
    """Return a gateway on the running loop that hears of every change of engines and gateways."""
    use_log_level(config.log)
    context = serve.get_replica_context()
    # A single gateway keeps its limits itself; several share them.
    send_update = actor_sender(context.app_name) if config.gateway.num_replicas > 1 else None
    rank, local_rank = 0, 0
    if context.rank is not None:
        rank, local_rank = context.rank.rank, context.rank.local_rank
    gateway = Gateway(
        config,
        context.replica_id.unique_id,
        send_update,
        served_names=served_names,
        rank=rank,
        local_rank=local_rank,
    )
    loop = asyncio.get_running_loop()
    network = await asyncio.to_thread(private_network, config, context.app_name)
    identity = network.identity()
    if (peers := gateway.together.peers) is not None:
        await peers.listen(network.host, tls=network.tls, clients=network.clients)
        discovery.gateways.subscribe(
            lambda members: loop.call_soon_threadsafe(
                peers.set_members, shown_to(members, identity)
            )
        )
        serve.get_deployment_handle(context.deployment, context.app_name, False)._init()
        # Before there are engines, for one of them may be drained.
        await peers.met(_MEET_S)
    discovery.engines.subscribe(
        lambda members: loop.call_soon_threadsafe(
            gateway.driver.engines.set_members, shown_to(members, identity)
        )
    )
    orders = loop.create_task(follow_orders(gateway, context.app_name))
    gateway.background.append(orders)
    models = _Models(gateway, context.app_name)
    for handle in engines:
        models.follow(handle)
    gateway.background.append(loop.create_task(models.watch_failures()))
    return gateway, models


class ServedGateway:
    """A gateway behind Serve's HTTP front end: HAProxy, or Serve's own proxy."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, args: dict, engines: Sequence[DeploymentHandle], served_names: tuple[str, ...]
    ) -> None:
        self._gateway, self._models = await _make_gateway(parse(args), engines, served_names)
        self._listeners = await _open_own_listeners(self._gateway)
        self._loop = asyncio.get_running_loop()
        gc.collect()
        gc.freeze()
        call_when_parent_ends(self._exit)

    async def reconfigure(self, content: dict[str, Any]) -> None:
        """As `OwnFrontGateway.reconfigure`."""
        await self._models.use(content)

    async def record_replica_metadata(self) -> dict:
        """As `OwnFrontGateway.record_replica_metadata`."""
        return _peer_metadata(self._gateway)

    async def check_health(self) -> None:
        """Return at once: Serve calls this on the gateway's event loop."""

    def _exit(self) -> NoReturn:
        """Leave, for there is no Ray any more. What is open ends with an error event."""
        closing = _close_gateway(self._gateway, self._listeners, 0.0)
        asyncio.run_coroutine_threadsafe(closing, self._loop).result()
        time.sleep(_LAST_WORDS_S)  # it is Serve that writes, and does not tell when it has
        os._exit(1)

    def __serve_build_asgi_app__(self) -> Front:
        return self._gateway.app

    async def __del__(self) -> None:
        if hasattr(self, "_listeners"):  # absent where `__init__` failed
            await _close_gateway(self._gateway, self._listeners, timeout_s=1.0)


def build(args: dict[str, Any]) -> serve.Application:
    """Return the application; `args` are those of `serving.config.Config`.

    Ray Serve calls this for `import_path: serving.cluster.application:build`. Raises
    `ConfigError` for a configuration that cannot work on the machines that are there.
    """
    return make_application(args, plan_application(args))


def make_application(
    args: dict[str, Any],
    plan: ServicePlan,
    leaving: Sequence[tuple[Config, Plan]] | None = None,
) -> serve.Application:
    """Return the application by a plan that was made for `args`.

    Deployed in the place of another, it restarts only what differs. Engines of the models that
    are `leaving` stay, though gateways know their models no more, so that what they have been
    asked can be answered; once gateways have heard it, they can be left out. None: it is the first.
    """
    config = parse(args)
    args = current_args(args)  # what is deployed need not warn again
    gateway = _deployment(
        "Gateway",
        OwnFrontGateway if config.gateway.front == "own" else serve.ingress(None)(ServedGateway),
        # What models there are it is told while it runs.
        {key: value for key, value in args.items() if not config.models or key not in OF_MODELS},
        drain_timeout_s=plan.drain_timeout_s,
        num_replicas=plan.num_gateways,
        ray_actor_options=plan.plans[0].gateway_actor_options,
        user_config={"models": [msgspec.to_builtins(_entry(*each)) for each in plan.models]},
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        **_knowing_each_other(plan.num_gateways),
        **_spread_evenly(plan.max_gateways_per_node),
    )
    # Gateways share limits by their number, which auto does not tell.
    args = {**args, "gateway": {**args.get("gateway", {}), "replicas": plan.num_gateways}}
    engines = tuple(
        _engines(*each, plan.num_shared_gpus, is_first=leaving is None)
        for each in (*plan.models, *(leaving or ()))
    )
    names = tuple(name for each in plan.models for name in served_names(*each))
    if not all(served_names(*each) for each in plan.models):
        names = ()  # some engines will tell
    return gateway.bind(args, engines, names)


def _engines(
    config: Config, plan: Plan, num_shared_gpus: int, *, is_first: bool
) -> serve.Application:
    """Return the engines of one model."""
    deployment = _deployment(
        plan.deployment,
        EngineReplica,
        # All that an engine is started by. Numbers may change while it runs.
        [
            config.engine.model_dump(mode="json"),
            config.log.model_dump(mode="json"),
            [plan.model, plan.served_model_name, plan.aliases, plan.engine_args, plan.device],
            [plan.num_gpus_per_replica, plan.first_core],
        ],
        drain_timeout_s=config.engine.drain_timeout_s,
        **_number_of_engines(config, plan, num_shared_gpus, is_first=is_first),
        ray_actor_options=plan.engine_actor_options,
        health_check_period_s=2,
        health_check_timeout_s=15,  # then a stopped process is killed and started again
        request_router_config=RequestRouterConfig(
            request_router_class="serving.cluster.discovery:EngineDirectory"
        ),
    )
    if plan.uses_bundled_model:
        plan = dataclasses.replace(plan, model=str(prepare_bundled_model()))
    return deployment.bind(config, plan)


def _deployment(
    name: str, what: type, made_of: Any, *, drain_timeout_s: float, **options: Any
) -> serve.Deployment:
    """Return a deployment whose replicas Serve replaces only if what they are `made_of` changes."""
    deployment = serve.deployment(
        name=name,
        max_ongoing_requests=_NO_LIMIT,
        graceful_shutdown_timeout_s=drain_timeout_s + 10,
        graceful_shutdown_wait_loop_s=0.1,
        **options,
    )(what)
    content = json.dumps(made_of, sort_keys=True, default=str)
    # Serve's own would be another one each time.
    deployment._version = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
    return deployment


def _entry(config: Config, plan: Plan) -> ModelEntry:
    """Return what gateways are told of a model."""
    router = config.router
    tpot_targets_s = router.tpot_target_s
    return ModelEntry(
        deployment=plan.deployment,
        names=served_names(config, plan),
        ttft_target_base_s=router.ttft_target_base_s,
        ttft_target_s_per_token=router.ttft_target_s_per_token,
        # Targets by name are the router's to look up.
        tpot_target_s=tpot_targets_s["*"] if list(tpot_targets_s) == ["*"] else None,
        scales=scaling_of(config, plan) is not None,
    )


def _knowing_each_other(num_gateways: int) -> dict[str, Any]:
    """Return Serve's options of gateways that are to hear of each other."""
    if num_gateways == 1:
        return {}
    directory = "serving.cluster.discovery:GatewayDirectory"
    return {"request_router_config": RequestRouterConfig(request_router_class=directory)}


def _spread_evenly(max_per_node: int) -> dict[str, Any]:
    """Return Serve's options of gateways of which no node gets more than so many."""
    return {"max_replicas_per_node": max_per_node} if max_per_node else {}


def _number_of_engines(
    config: Config, plan: Plan, num_shared_gpus: int, *, is_first: bool
) -> dict[str, Any]:
    """Return Serve's options of the number of engines: fixed, or by our policy."""
    settings = scaling_of(config, plan)
    if settings is None:
        return {"num_replicas": plan.num_replicas}
    model = ScaledModel(
        settings=settings.model_dump(),
        num_gpus=plan.num_gpus_per_replica,
        num_shared_gpus=num_shared_gpus if plan.num_gpus_per_replica else 0,
    )
    return serve_options(model, is_first=is_first)
