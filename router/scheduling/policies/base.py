"""What is a policy, and what is it told?"""

import random
from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar

import msgspec

from router.fleet.replica import Replica
from router.types import Request

POLICIES: dict[str, "type[Policy]"] = {}  # by name


class Load(msgspec.Struct, frozen=True):
    """What waits in the router itself when a request is placed."""

    # Held requests of its model, divided by the number of engines to choose from. Includes
    # the request itself if it is held.
    num_held_per_engine: float


class Policy:
    """Chooses one replica. The placer has filtered by health, room and limits before.

    A subclass is registered in `POLICIES` by its `name` when it is defined.
    """

    name: ClassVar[str]  # as in `router.policy`
    holds: ClassVar[bool] = False  # whether it is made for a hold queue in front of it
    reads_engines: ClassVar[bool] = True  # whether its choice depends on what engines report
    wants_prefix: bool = False  # whether it reads `Request.prefix_hashes`
    wants_blocks: bool = False  # whether it reads `Request.block_hashes`, made from these

    def __init__(self, rng: random.Random, ablated: Collection[str] = ()) -> None:
        self.rng = rng  # injected: a seed reproduces a run
        self.ablated = sorted(set(ablated))  # parts that the router does without

    def __init_subclass__(cls, **options: Any) -> None:
        """Register the class; raise `TypeError` if it has no name or that of another."""
        super().__init_subclass__(**options)
        if "name" not in cls.__dict__:
            raise TypeError(f"policy {cls.__name__} needs a name")
        other = POLICIES.get(cls.name, cls)
        # A dataclass with slots is defined twice, hence no comparison of the classes.
        if (other.__module__, other.__name__) != (cls.__module__, cls.__name__):
            raise TypeError(f"{cls.__name__} and {other.__name__} are both {cls.name!r}")
        POLICIES[cls.name] = cls

    def choose(
        self, request: Request, replicas: Sequence[Replica], load: Load, now_s: float
    ) -> Replica:
        """Return one of `replicas`, which is never empty."""
        raise NotImplementedError

    def observe(self, replica: Replica, latency_s: float, now_s: float) -> None:
        """Learn the time to a first token, or to a whole response without one, seconds.

        Optional: most policies learn nothing from it.
        """

    def draw_lowest(
        self, replicas: Sequence[Replica], key: Callable[[Replica], tuple[float, ...]]
    ) -> Replica:
        """Return a replica of the lowest key, a random one among equals.

        If it were the first one, an idle fleet would send everything to its first engine.
        """
        keys = [key(replica) for replica in replicas]
        lowest = min(keys)
        equals = [replica for replica, k in zip(replicas, keys, strict=True) if k == lowest]
        return equals[int(self.rng.random() * len(equals))]
