"""Where is the keeper of an application's leases, and how do its gateways reach it? A Ray actor."""

import asyncio
from typing import Any

import ray

from serving.gateway.providers.leases import LeaseKeeper, SendUpdate

_CHECK_S = 30.0


class LeaseActor:
    """`LeaseKeeper` as Ray runs it. It outlives gateways, and ends by itself after them."""

    def __init__(self) -> None:
        # A restarted actor has lost what its predecessor granted.
        is_restart = ray.get_runtime_context().was_current_actor_reconstructed
        self._keeper = LeaseKeeper(is_restart=is_restart)
        self._ending: asyncio.Task[None] | None = None

    async def answer_update(
        self, gateway_id: str, key_id: str, limits: str, message: bytes
    ) -> bytes:
        """As `LeaseKeeper.answer_update`."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._end_when_idle())
        return self._keeper.answer_update(gateway_id, key_id, limits, message)

    async def _end_when_idle(self) -> None:
        while not self._keeper.is_idle:
            await asyncio.sleep(_CHECK_S)
        ray.kill(ray.get_runtime_context().current_actor)


def actor_sender(application: str) -> SendUpdate:
    """Return what sends updates to the application's actor, which it starts if there is none."""
    actor: Any = None

    async def send_update(gateway_id: str, key_id: str, limits: str, message: bytes) -> bytes:
        nonlocal actor
        try:
            if actor is None:
                actor = await asyncio.to_thread(_get_actor, f"leases-{application}")
            return await actor.answer_update.remote(gateway_id, key_id, limits, message)
        except ray.exceptions.RayActorError:
            actor = None  # it has ended: the next update starts another
            raise

    return send_update


def _get_actor(name: str) -> Any:
    """Return the actor of this name; it belongs to nobody, so no gateway's death ends it."""
    # Gateways may be of several jobs, and an unnamed namespace is each job's own.
    options = {"name": name, "namespace": "headway", "get_if_exists": True}
    return (
        ray.remote(LeaseActor)
        .options(**options, lifetime="detached", max_restarts=-1, num_cpus=0)
        .remote()
    )
