"""Where is an application's autoscaler, and who talks to it? A Ray actor.

    gateway --what it has seen, every second--> actor --which engines get nothing new--> gateway
    Serve's controller --what runs--> actor --how many should--> Serve's controller

Serve calls `AutoscalingPolicy` in its controller ten times a second, by its own hook for custom
policies (`AutoscalingConfig.policy`), which must not block: it asks the actor and returns what the
actor has said last.
"""

import asyncio
import logging
import time
from concurrent.futures import Future
from typing import Any

import msgspec
import ray

from router.scaling.demand import Demand
from router.scaling.settings import ScalingSettings
from serving.cluster.actors.scaling_keeper import Orders, ScalingKeeper
from serving.gateway.app import Gateway
from serving.gateway.observe.state import ScalerState

logger = logging.getLogger(__name__)

_PERIOD_S = 1.0  # between two reports of a gateway, or two questions of Serve's
_IDLE_S = 60.0  # an actor that nobody asks for so long ends


class ScalingActor:
    """`ScalingKeeper` as Ray runs it. It outlives gateways, and ends by itself after them."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._keeper = ScalingKeeper(ScalingSettings.model_validate(settings))
        self._keeper.last_call_s = time.monotonic()
        self._ending: asyncio.Task[None] | None = None

    async def report(self, gateway_id: str, demand: bytes) -> bytes:
        """Take in a gateway's `Demand`; return its `Orders`."""
        decoded = msgspec.msgpack.decode(demand, type=Demand)
        return msgspec.msgpack.encode(self._keeper.report(gateway_id, decoded, time.monotonic()))

    async def decide(self, running: list[str], num_target: int) -> int:
        """Return how many engines Serve should run."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._end_when_idle())
        wanted = self._keeper.state.num_wanted
        number = self._keeper.decide(running, num_target, time.monotonic())
        if self._keeper.state.num_wanted != wanted:
            logger.info("%s", self._keeper.state)
        return number

    async def _end_when_idle(self) -> None:
        while time.monotonic() - self._keeper.last_call_s < _IDLE_S:
            await asyncio.sleep(_IDLE_S / 4.0)
        ray.kill(ray.get_runtime_context().current_actor)


def _get_actor(application: str, settings: dict[str, Any]) -> Any:
    """Return the application's actor; it belongs to nobody, so nobody's death ends it."""
    options = {"name": f"scaling-{application}", "namespace": "headway", "get_if_exists": True}
    return (
        ray.remote(ScalingActor)
        .options(**options, lifetime="detached", max_restarts=-1, num_cpus=0)
        .remote(settings)
    )


class AutoscalingPolicy:
    """What Serve's controller calls."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
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
            self._actor = _get_actor(context.app_name, self._settings)
        running = [replica.unique_id for replica in context.running_replicas]
        asked = self._actor.decide.remote(running, context.target_num_replicas)
        self._answer = asked.future()


async def follow_orders(gateway: Gateway, application: str, settings: dict[str, Any]) -> None:
    """Report what a gateway has seen, and send no new work to engines that are to be emptied."""
    actor: Any = None
    while True:
        try:
            if actor is None:
                actor = await asyncio.to_thread(_get_actor, application, settings)
            demand = msgspec.msgpack.encode(gateway.router.demand())
            answer = await actor.report.remote(gateway.gateway_id, demand)
            orders = msgspec.msgpack.decode(answer, type=Orders)
            gateway.driver.engines.follow(orders.emptying, orders.ready_in_s)
            gateway.scalers[""] = ScalerState(
                wanted=orders.wanted,
                num_running=orders.num_running,
                num_emptying=len(orders.emptying),
                ready_in_s=orders.ready_in_s,
            )
        except ray.exceptions.RayActorError:
            actor = None  # it has ended: the next report starts another
        except Exception:  # requests are served all the same
            logger.exception("the autoscaler cannot be told of demand")
        await asyncio.sleep(_PERIOD_S)
