"""Which engines of a fleet are fit to work, by what is seen from outside.

An engine is *stale* when its snapshots stop though it promised them (a dead
node, a stopped process, a network that swallows), and *hung* when they come but
tell of no step while there is work (a scheduler step that never ends). Both
open its breaker and have its requests moved; single failures and slow first
tokens reach the breaker by the calls themselves (`router.core.router`).
"""

import random
from collections.abc import Iterable, Sequence

from router.fleet.admission import accepts_work
from router.fleet.fleet import Fleet
from router.fleet.replica import Replica
from router.resilience.breaker import Breaker, BreakerEvent, BreakerLog, BreakerState, TripReason
from router.scheduling.placer import Placement
from router.settings import RouterSettings
from router.types import EngineInfo, Evacuate

# Between two looks at all engines: finer than any setting that they are held against.
_CHECK_PERIOD_S = 0.25
# Predicted steps that a step may take before it counts as hung, where that is longer than
# `hang_s`: the prediction is of the mean, and a long prompt beside others, or a neighbour on
# the same core, makes several of it. With both defaults a hang is seen within 5 s wherever
# steps take up to 1.1 s.
_HANG_STEPS = 4.0
# Lost engines whose breakers are remembered in case the same one connects again. One
# that Ray started anew has another id, so most of these never come back.
_MAX_LOST = 64
_MAX_LOG = 256


class Health:
    """Keeps the breakers of all engines; `check` moves what time and silence move."""

    def __init__(self, settings: RouterSettings, rng: random.Random) -> None:
        self.log = BreakerLog(maxlen=_MAX_LOG)
        self.next_check_s = 0.0
        self._settings = settings
        self._rng = rng
        self._lost: dict[str, Breaker] = {}

    def breaker(
        self, replica_id: str, info: EngineInfo, fleet: Iterable[Replica], now_s: float
    ) -> Breaker:
        """The breaker of an engine that has connected: its former one if it was lost before.

        A new engine among others that have been at work for a while starts
        slowly; where all are new, or out, there is nobody to leave the work to.
        """
        if (breaker := self._lost.pop(replica_id, None)) is not None:
            return breaker
        ramp_s = self._settings.breaker.slow_start_s
        others_are_warm = any(
            info.model in replica.names and accepts_work(replica) and now_s - replica.up_s > ramp_s
            for replica in fleet
        )
        return Breaker(
            self._settings.breaker,
            self._rng,
            now_s,
            name=replica_id,
            log=self.log,
            slow_start=others_are_warm,
        )

    def lose(self, replica: Replica, now_s: float) -> None:
        """The connection is gone. Of one that was draining nothing else was expected."""
        if replica.is_draining:
            return
        replica.breaker.trip(TripReason.LOST, now_s)
        self._lost[replica.id] = replica.breaker
        while len(self._lost) > _MAX_LOST:
            del self._lost[next(iter(self._lost))]

    def check(self, fleet: Fleet, now_s: float) -> list[Evacuate]:
        """Open, half-open and warm up; return which engines are to be left.

        One is left only while another could take its requests: what hangs may
        yet go on, and to wait here costs no more than to wait in the queue.
        """
        self.next_check_s = now_s + _CHECK_PERIOD_S
        sick = []
        for replica in fleet:
            breaker = replica.breaker
            reason = self._ailment(replica, now_s)
            if reason is not None:
                breaker.trip(reason, now_s)
                sick.append((replica, reason))
            elif breaker.is_settled:
                continue
            breaker.tick(now_s)
            fleet.refresh(replica)
        return [
            Evacuate(replica.id, reason.value)
            for replica, reason in sick
            if replica.ledger.num_open and fleet.working(replica.info.model)
        ]

    def judge_slow(self, placements: Sequence[Placement], fleet: Fleet, now_s: float) -> None:
        """Count these calls to one engine as slow, if slowness may count against it.

        Always against a probe. Else not where half of its fellows are out already:
        what slows all of them is load, and fewer engines would only be slower
        (Envoy's panic threshold).
        """
        if not placements:
            return
        replica = placements[0].replica
        if replica.breaker.status is not BreakerState.HALF_OPEN:
            fellows = [other for other in fleet if other.info.model == replica.info.model]
            if 2 * sum(map(accepts_work, fellows)) <= len(fellows):
                return
        for placement in placements:
            replica.breaker.slow(placement.permit, now_s)
        fleet.refresh(replica)

    def state(self) -> list[dict[str, object]]:
        """The last events of all breakers, oldest first; JSON-able."""
        return [
            {name: getattr(event, name) for name in BreakerEvent.__struct_fields__}
            for event in self.log
        ]

    def _ailment(self, replica: Replica, now_s: float) -> TripReason | None:
        settings = self._settings
        if replica.info.heartbeat_s and now_s - replica.snapshot_s > max(
            settings.stale_s, 2.0 * replica.info.heartbeat_s
        ):
            return TripReason.STALE
        waited_s, predicted_s = replica.step_wait_s(now_s)
        if waited_s > max(settings.hang_s, _HANG_STEPS * predicted_s):
            return TripReason.HUNG
        return None
