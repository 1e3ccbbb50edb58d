"""In which order are requests served, and by whose choice of engine?

A service discipline, as queueing theory calls it: the policy that chooses among engines,
whether requests wait in the hold queue, and whether earliest deadline first (EDF) or first
come, first served (FCFS) orders them:

    EDF --predicted first tokens are far off, or the part `order` is ablated--> FCFS
    FCFS --predictions are twice as good again--> EDF
"""

import random
from collections.abc import Collection

import msgspec

from router.core.settings import RouterSettings
from router.fleet.fleet import Fleet
from router.queueing.deadline import edf_key_s, engine_put_off_s, unshifted_edf_key_s
from router.queueing.hold_queue import HoldQueue
from router.scheduling.attempt import Attempts
from router.scheduling.placer import Placer
from router.scheduling.policies import make_policy
from router.scheduling.predictions import Predictions
from router.types import Request


class Discipline:
    """Keeps placer and queue by the policy and by how good predictions are."""

    def __init__(
        self,
        fleet: Fleet,
        queue: HoldQueue,
        attempts: Attempts,
        placer: Placer,
        predictions: Predictions,
        settings: RouterSettings,
        rng: random.Random,
    ) -> None:
        self._fleet = fleet
        self._queue = queue
        self._attempts = attempts
        self._placer = placer
        self._predictions = predictions
        self._settings = settings
        self._rng = rng
        self.follow()

    @property
    def wants_prefix(self) -> bool:
        """Whether requests should come with their `prefix_hashes`."""
        return self._placer.policy.wants_prefix

    def set_policy(self, name: str, ablate: Collection[str]) -> None:
        """Choose by another policy from now on, without the parts named in `ablate`.

        Raises `ValueError` for a name that is not in `POLICIES` and for a part that does not
        exist.
        """
        policy = make_policy(name, self._rng, ablate)
        self._predictions.restart()
        self._placer.policy = policy
        self.follow()

    def follow(self) -> bool:
        """Hold and order as the policy and predictions say; return whether the order changed.

        By arrival while predictions are bad, whatever the policy wants.
        """
        policy = self._placer.policy
        holds = policy.holds if self._settings.hold is None else self._settings.hold
        return self._placer.use_order(
            holds=holds and "hold" not in policy.ablated,
            by_arrival="order" in policy.ablated or self._predictions.are_bad,
        )

    def predicted_ttft_s(self, request_id: str) -> float | None:
        """Return the seconds from placing a request to its first token, as was predicted.

        Of its oldest attempt; None if it is at no engine.
        """
        attempt = self._attempts.oldest(request_id)
        return None if attempt is None else attempt.predicted_ttft_s

    def rank(self, request: Request) -> Request:
        """Return a new request with its predicted output length and its place in the order."""
        request = self._predictions.on_arrival(
            request,
            self._fleet.prefill_s_per_token(request.model),
            has_length="length" not in self._placer.policy.ablated,
        )
        if self._is_edf:
            edf_s = edf_key_s(request, self._settings)
            request = msgspec.structs.replace(request, edf_key_s=edf_s)
        return request

    def engine_priority_s(self, request: Request) -> float | None:
        """Return by what time the engine should order the request, too; None: as they arrive.

        On the clock of `request.arrival_s`. The order of the hold queue, carried on inside the
        engine, so that a short prompt also passes those that wait there.
        """
        if not self._is_edf:
            return None
        attempt = self._attempts.oldest(request.id)
        placed = attempt.request if attempt is not None else request
        return unshifted_edf_key_s(placed, self._settings) + engine_put_off_s(placed)

    @property
    def _is_edf(self) -> bool:
        return self._placer.holds and not self._queue.by_arrival
