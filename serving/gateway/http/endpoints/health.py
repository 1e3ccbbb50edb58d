"""Can a request be answered now? What `/health` says, per model."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import msgspec

from router import RouterState
from router.resilience.breaker import BreakerState


class ModelHealth(msgspec.Struct):
    """Who may answer for one model."""

    num_engines: int = 0  # connected
    num_ready: int = 0  # of these, sent work
    has_provider: bool = False
    is_ready: bool = False
    error: str | msgspec.UnsetType = msgspec.UNSET  # why its engines could not be started


class Health(msgspec.Struct, kw_only=True):
    """Whether the gateway can have a request answered, and by whom."""

    status: str  # "ok", or what is missing
    is_ready: bool
    num_engines: int
    num_ready: int
    models: dict[str, ModelHealth]


def make_health(
    state: RouterState,
    provider_models: Iterable[str],
    *,
    starts_engines: bool = False,
    without_engine: Mapping[str, str] = MappingProxyType({}),
) -> Health:
    """Return what the engines' breakers admit, and what providers stand in for.

    `starts_engines`: where there is no engine, or those that are there are about to stop, a request
    has one started or kept, and is answered then.
    `without_engine`: models beside those that have one, with why they cannot start, if so.

    A half-open breaker counts as ready: only a request shows whether its engine works again, so
    requests have to come. An engine that waits for a suspect's answer counts, too.
    """
    models: dict[str, ModelHealth] = {}
    num_staying = 0
    for replica in state.replicas.values():
        health = models.setdefault(replica.info.model, ModelHealth())
        health.num_engines += 1
        if replica.is_draining:
            continue
        num_staying += 1
        if replica.breaker.state is not BreakerState.OPEN:
            health.num_ready += 1
            health.is_ready = True
    for name in provider_models:
        health = models.setdefault(name, ModelHealth())
        health.has_provider = health.is_ready = True
    for name, error in without_engine.items():
        health = models.setdefault(name, ModelHealth())
        if error:
            health.error = error
    num_engines = sum(health.num_engines for health in models.values())
    num_ready = sum(health.num_ready for health in models.values())
    sleeps = starts_engines and not num_staying
    is_ready = sleeps or any(health.is_ready for health in models.values())
    if num_ready:
        status = "ok"
    elif sleeps:
        status = "no engine: a request has one started"
    elif is_ready:
        status = "providers only"
    else:
        status = "no engine takes requests" if num_engines else "no engine"
    return Health(
        status=status,
        is_ready=is_ready,
        num_engines=num_engines,
        num_ready=num_ready,
        models=models,
    )
