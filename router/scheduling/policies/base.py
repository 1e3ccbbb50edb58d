"""What a policy is."""

import random
from collections.abc import Callable, Collection, Sequence
from typing import ClassVar

from router.fleet.replica import Replica
from router.types import Request


class Policy:
    """Chooses among replicas. Health, room and limits were filtered before."""

    holds: ClassVar[bool] = False  # whether it is made for a hold queue in front of it
    wants_prefix: bool = False  # whether it reads `Request.prefix_hashes`
    wants_blocks: bool = False  # whether these are to be made `Request.block_hashes`

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng  # injected: a seed reproduces a run
        self.name = ""  # that the configuration has for it
        self.ablated: list[str] = []  # parts that the router does without
        # Requests of the model that wait for an engine, over the engines to choose from.
        self.num_held_per_engine = 0.0

    def choose(self, request: Request, replicas: Sequence[Replica], now_s: float) -> Replica:
        """Return one of `replicas`, which is never empty."""
        raise NotImplementedError

    def observe(self, replica: Replica, latency_s: float, now_s: float) -> None:
        """Learn that a first token, or a whole response without one, took so long.

        Optional: most policies have nothing to learn from it.
        """

    def ablate(self, parts: Collection[str]) -> None:
        """Do without these parts from now on, to see what they are worth.

        Parts of the choice are the policy's own to leave out; most have none.
        """
        self.ablated = sorted(set(parts))

    def draw_lowest(
        self, replicas: Sequence[Replica], key: Callable[[Replica], tuple[float, ...]]
    ) -> Replica:
        """Return a replica of the lowest key, a random one among equals.

        Were it the first, an idle fleet would send all to its first engine.
        """
        keys = [key(replica) for replica in replicas]
        lowest = min(keys)
        equals = [replica for replica, k in zip(replicas, keys, strict=True) if k == lowest]
        return equals[int(self.rng.random() * len(equals))]
