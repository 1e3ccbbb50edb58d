"""The Ray actor that keeps the budgets of an application's gateways."""

import asyncio
from typing import Any

import ray

from serving.gateway.providers.leases import Ask, BudgetKeeper

_LOOK_S = 30.0


class BudgetActor:
    """`BudgetKeeper` as Ray runs it. It outlives gateways, and ends by itself after them."""

    def __init__(self) -> None:
        # A restarted actor has lost what its predecessor granted.
        is_restart = ray.get_runtime_context().was_current_actor_reconstructed
        self._keeper = BudgetKeeper(is_restart=is_restart)
        self._leaving: asyncio.Task[None] | None = None

    async def hear(self, gateway_id: str, key_id: str, limits: str, message: bytes) -> bytes:
        """As `BudgetKeeper.hear`."""
        if self._leaving is None:
            self._leaving = asyncio.create_task(self._leave_when_idle())
        return self._keeper.hear(gateway_id, key_id, limits, message)

    async def _leave_when_idle(self) -> None:
        while not self._keeper.is_idle:
            await asyncio.sleep(_LOOK_S)
        ray.kill(ray.get_runtime_context().current_actor)


def ask_actor(application: str) -> Ask:
    """Return a way to the application's actor, which is started if it is not there."""
    actor: Any = None

    async def ask(gateway_id: str, key_id: str, limits: str, message: bytes) -> bytes:
        nonlocal actor
        try:
            if actor is None:
                actor = await asyncio.to_thread(_actor, f"budgets-{application}")
            return await actor.hear.remote(gateway_id, key_id, limits, message)
        except ray.exceptions.RayActorError:
            actor = None  # it has left: the next question starts another
            raise

    return ask


def _actor(name: str) -> Any:
    """The actor of this name; it belongs to nobody, so no gateway's death ends it."""
    # Gateways may be of several jobs, and an unnamed namespace is each job's own.
    options = {"name": name, "namespace": "headway", "get_if_exists": True}
    return (
        ray.remote(BudgetActor)
        .options(**options, lifetime="detached", max_restarts=-1, num_cpus=0)
        .remote()
    )
