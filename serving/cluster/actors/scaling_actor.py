"""Where is an application's autoscaler, and who talks to it? A Ray actor.

    gateway --what it has seen, every second--> actor --which engines get nothing new--> gateway
    Serve's controller --what runs--> actor --how many should--> Serve's controller

Serve calls `AutoscalingPolicy`, one for each model, in its controller ten times a second, by its
own hook for custom policies (`AutoscalingConfig.policy`), which must not block: it asks the actor
and returns what the actor has said last.
"""

import asyncio
import logging
import time
from concurrent.futures import Future
from typing import Any

import msgspec
import ray
from ray.serve import config as serve_config

from router.scaling.settings import ScalingSettings
from serving.cluster.actors.application_scaling import ApplicationScaling, Report, ScaledModel
from serving.cluster.actors.scaling_keeper import Orders
from serving.gateway.app import Gateway
from serving.gateway.observe.state import ScalerState

logger = logging.getLogger(__name__)

_PERIOD_S = 1.0  # between two reports of a gateway, or two questions of Serve's
_IDLE_S = 60.0  # an actor that nobody asks for so long ends


class ScalingActor:
    """`ApplicationScaling` as Ray runs it. It outlives gateways, and ends by itself after them."""

    def __init__(self) -> None:
        self._scaling = ApplicationScaling()
        self._last_call_s = time.monotonic()
        self._ending: asyncio.Task[None] | None = None

    async def report(self, gateway_id: str, report: bytes) -> bytes:
        """Take in a gateway's `Report`; return its `Orders` by deployment."""
        decoded = msgspec.msgpack.decode(report, type=Report)
        orders = self._scaling.report(gateway_id, decoded, time.monotonic())
        return msgspec.msgpack.encode(orders)

    async def decide(
        self, deployment: str, model: bytes, running: list[str], num_target: int
    ) -> int:
        """Return how many engines of a model, a `ScaledModel`, Serve should run."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._end_when_idle())
        now_s = self._last_call_s = time.monotonic()
        before = self._scaling.state(deployment)
        decoded = msgspec.msgpack.decode(model, type=ScaledModel)
        number = self._scaling.decide(deployment, decoded, running, num_target, now_s)
        state = self._scaling.state(deployment)
        if before is None or state is None or before.num_wanted != state.num_wanted:
            logger.info("%s: %s", deployment, state)
        return number

    async def _end_when_idle(self) -> None:
        while time.monotonic() - self._last_call_s < _IDLE_S:
            await asyncio.sleep(_IDLE_S / 4.0)
        ray.kill(ray.get_runtime_context().current_actor)


def _get_actor(application: str) -> Any:
    """Return the application's actor; it belongs to nobody, so nobody's death ends it."""
    options = {"name": f"scaling-{application}", "namespace": "headway", "get_if_exists": True}
    return (
        ray.remote(ScalingActor)
        .options(**options, lifetime="detached", max_restarts=-1, num_cpus=0)
        .remote()
    )


class AutoscalingPolicy:
    """What Serve's controller calls, of one model."""

    def __init__(self, model: dict[str, Any]) -> None:
        """`model`: a `ScaledModel`."""
        self._model = msgspec.msgpack.encode(model)
        self._actor: Any = None
        self._asked_s = 0.0
        self._answer: Future[int] | None = None
        self._number: int | None = None

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Return how many engines there should be, and no state of Serve's to keep."""
        try:
            self._ask(context)
        except Exception:  # it must not end the controller; what it said last holds
            logger.exception("the autoscaler cannot be asked")
            self._actor = self._answer = None
        number = context.target_num_replicas if self._number is None else self._number
        return number, {}

    def _ask(self, context: Any) -> None:
        if self._answer is not None:
            if not self._answer.done():
                return
            answer, self._answer = self._answer, None
            self._number = answer.result()
        now_s = time.monotonic()
        if now_s - self._asked_s < _PERIOD_S:
            return
        self._asked_s = now_s
        if self._actor is None:
            self._actor = _get_actor(context.app_name)
        running = [replica.unique_id for replica in context.running_replicas]
        name, num_target = context.deployment_name, context.target_num_replicas
        asked = self._actor.decide.remote(name, self._model, running, num_target)
        self._answer = asked.future()


def serve_options(model: ScaledModel, *, is_first: bool) -> dict[str, Any]:
    """Return Serve's options for a number of engines that this module decides.

    `is_first`: Serve does not have them yet. With each change of them it would go back to the
    initial number.
    """
    settings = ScalingSettings.model_validate(model.settings)
    policy = serve_config.AutoscalingPolicy(
        policy_function=f"{__name__}:{AutoscalingPolicy.__name__}",
        policy_kwargs={"model": msgspec.to_builtins(model)},
    )
    return {
        "autoscaling_config": serve_config.AutoscalingConfig(
            min_replicas=settings.min,
            max_replicas=settings.max,
            initial_replicas=settings.num_initial if is_first else None,
            # The policy has delays of its own.
            upscale_delay_s=0.0,
            downscale_delay_s=0.0,
            downscale_to_zero_delay_s=0.0,
            policy=policy,
        )
    }


async def follow_orders(gateway: Gateway, application: str) -> None:
    """Report what a gateway has seen, and send no new work to engines that are to be emptied."""
    actor: Any = None
    while True:
        try:
            scaled = gateway.served_models.scaled
            if actor is None and scaled:
                actor = await asyncio.to_thread(_get_actor, application)
            if actor is not None:
                report = Report(
                    demand={
                        deployment: gateway.router.demand(names)
                        for deployment, names in scaled.items()
                    },
                    out_of_use=gateway.driver.engines.out_of_use,
                )
                message = msgspec.msgpack.encode(report)
                answer = await actor.report.remote(gateway.gateway_id, message)
                _follow(gateway, msgspec.msgpack.decode(answer, type=dict[str, Orders]))
        except ray.exceptions.RayActorError:
            actor = None  # it has ended: the next report starts another
        except Exception:  # requests are served all the same
            logger.exception("the autoscaler cannot be told of demand")
        await asyncio.sleep(_PERIOD_S)


def _follow(gateway: Gateway, orders: dict[str, Orders]) -> None:
    models, now_s = gateway.served_models, time.monotonic()
    gateway.driver.engines.empty({each for order in orders.values() for each in order.emptying})
    for deployment, order in orders.items():
        ready_in_s = order.ready_in_s
        models.expect_engine(deployment, None if ready_in_s is None else now_s + ready_in_s)
    gateway.scalers = {
        models.name_of(deployment): ScalerState(
            wanted=order.wanted,
            num_running=order.num_running,
            num_emptying=len(order.emptying),
            ready_in_s=order.ready_in_s,
        )
        for deployment, order in orders.items()
    }
