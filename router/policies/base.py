"""What a policy is."""

import random
from collections.abc import Sequence
from typing import ClassVar

from router.replica import Replica
from router.types import Request


class Policy:
    """Chooses among replicas. Health, room and limits were filtered before."""

    holds: ClassVar[bool] = False  # whether it is made for a hold queue in front of it

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng  # injected: a seed reproduces a run

    def choose(self, request: Request, replicas: Sequence[Replica], now_s: float) -> Replica:
        """Return one of `replicas`, which is never empty."""
        raise NotImplementedError

    def observe(self, replica: Replica, latency_s: float, now_s: float) -> None:
        """Learn that a first token, or a whole response without one, took so long.

        Optional: most policies have nothing to learn from it.
        """
