"""Which engines of a fleet are fit to work, as seen from outside?

An engine is *stale* when it gives no sign of life although it has a heartbeat (a dead
node, a stopped process, a network that drops packets), and *hung* when it lives but reports
no step while there is work (a scheduler step that never ends): `VitalSigns`. Both
open its breaker and have its requests moved; single failures and slow first
tokens reach the breaker by the calls themselves (`router.core.router`).
"""

import random
from collections.abc import Iterable, Sequence

from router.core.settings import RouterSettings
from router.fleet.admission import accepts_work
from router.fleet.fleet import Fleet
from router.fleet.replica import Replica
from router.resilience.breaker import Breaker, BreakerLog, BreakerState, TripReason
from router.resilience.settings import BreakerSettings
from router.types import EngineInfo, EngineSnapshot, Evacuate

# Between two checks of all engines: finer than any setting that they are checked against.
_CHECK_PERIOD_S = 0.25
# Predicted steps that a step may take before it counts as hung, where that is longer than
# `hang_s`: the prediction is of the mean, and a long prompt beside others, or a neighbour on
# the same core, makes several of it. With both defaults a hang is seen within 5 s wherever
# steps take up to 1.1 s.
_HANG_STEPS = 4.0
# Of somebody else's server neither the size of a step is known nor, at first, what it takes; and
# whether it goes on is seen only now and then. So much longer it is waited for.
_EXTERNAL_PATIENCE = 5.0
# Lost engines whose breakers are remembered in case the same one connects again. One
# that Ray started anew has another id, so most of these never come back.
_MAX_LOST = 64
_MAX_LOG = 256


class Health:
    """Keeps the breakers of all engines; `check` moves them by time and by silence."""

    def __init__(self, settings: RouterSettings, rng: random.Random) -> None:
        self.log = BreakerLog(maxlen=_MAX_LOG)  # of all breakers, oldest event first
        self.next_check_s = 0.0
        self._settings = settings
        self._rng = rng
        self._lost: dict[str, Breaker] = {}

    def breaker(
        self, replica_id: str, info: EngineInfo, fleet: Iterable[Replica], now_s: float
    ) -> Breaker:
        """Return the breaker of an engine that has connected: its former one if it was lost before.

        A new engine starts slowly among others that have been at work for a while; where
        all are new, or take no work, nobody else could do the work.
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

    def record_loss(self, replica: Replica, now_s: float) -> None:
        """Open the breaker of an engine whose connection is gone, unless it was draining."""
        if replica.is_draining:
            return
        replica.breaker.trip(TripReason.LOST, now_s)
        self._lost[replica.id] = replica.breaker
        while len(self._lost) > _MAX_LOST:
            del self._lost[next(iter(self._lost))]

    def check(self, fleet: Fleet, now_s: float) -> list[Evacuate]:
        """Move every breaker. Return which sick engines the requests have to leave.

        They leave only while another engine could take them: what hangs may yet
        go on, and to wait there costs no more than to wait in the queue.
        """
        self.next_check_s = now_s + _CHECK_PERIOD_S
        sick = []
        for replica in fleet:
            breaker = replica.breaker
            reason = self._trip_reason(replica, now_s)
            if reason is not None:
                breaker.trip(reason, now_s)
                sick.append((replica, reason))
            elif breaker.is_steady:
                continue
            breaker.tick(now_s)
            fleet.refresh(replica)
        return [
            Evacuate(replica.id, reason.value)
            for replica, reason in sick
            if replica.ledger.num_open and fleet.any_works(replica.info.model)
        ]

    def judge_slow(
        self, replica: Replica, permits: Sequence[int], fleet: Fleet, now_s: float
    ) -> None:
        """Count these calls to an engine, by their permits, as slow if that may count against it.

        It always may while the breaker is half-open. Else not where half of the model's
        engines take no work already: what slows all of them is load, and fewer engines would
        only be slower (Envoy's panic threshold).
        """
        if not permits:
            return
        if replica.breaker.status is not BreakerState.HALF_OPEN:
            engines = [each for each in fleet if each.info.model == replica.info.model]
            if 2 * sum(map(accepts_work, engines)) <= len(engines):
                return
        for permit in permits:
            replica.breaker.record_slow(permit, now_s)
        fleet.refresh(replica)

    def _trip_reason(self, replica: Replica, now_s: float) -> TripReason | None:
        """Return what is wrong with an engine, None if nothing is known to be."""
        settings = self._settings
        silent_s = replica.vital_signs.silent_s(replica.snapshot_s, now_s)
        if replica.info.heartbeat_s and silent_s > max(
            settings.stale_s, 2.0 * replica.info.heartbeat_s
        ):
            return TripReason.STALE
        waited_s, predicted_s = replica.step_wait_s(now_s)
        if replica.adapters is not None:
            predicted_s += replica.adapters.loading_s()
        hang_s = settings.hang_s * (_EXTERNAL_PATIENCE if replica.info.is_external else 1.0)
        if waited_s > max(hang_s, _HANG_STEPS * predicted_s):
            return TripReason.HUNG
        return None


def was_step_slow(replica: Replica, snapshot: EngineSnapshot, settings: BreakerSettings) -> bool:
    """Whether a snapshot not yet received reports a step far longer than predicted."""
    if snapshot.step_s <= settings.slow_floor_s:
        return False
    predicted_s = replica.predictor.step_s(
        snapshot.step_num_prefill_tokens, snapshot.step_num_decode_reqs
    )
    is_new = snapshot.num_steps_total != replica.snapshot.num_steps_total
    return is_new and settings.is_slow(snapshot.step_s, predicted_s)
