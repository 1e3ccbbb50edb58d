r"""Which engine has a suspect to itself, and when?

    free --claimed--> emptying --nobody there is fresh--> given to the suspect
      ^                  |                                  |
      \--suspect left----/  \--it is fresh no more, or ends--/

Whoever has decoded there for a while may stay: if the engine dies, it was not them. The last
engine is not risked: a suspect waits until there are two, or until one has come up since the
death. No two suspects of one body are at engines at once, or two engines could die of it at the
same time.
"""

from router.fleet.admission import kv_need_tokens
from router.fleet.fleet import Fleet
from router.fleet.replica import Replica
from router.queueing.hold_queue import HoldQueue
from router.resilience.breaker import BreakerState
from router.resilience.suspects import Suspects, body_of
from router.scheduling.attempt import Attempts
from router.types import Request


class Quarantine:
    """Engines that nobody else is sent to, by who has them: a suspect, held or fresh."""

    __slots__ = ("_attempts", "_claims", "_fleet", "_queue", "_suspects")

    def __init__(
        self, fleet: Fleet, queue: HoldQueue, attempts: Attempts, suspects: Suspects
    ) -> None:
        self._fleet = fleet
        self._queue = queue
        self._attempts = attempts
        self._suspects = suspects
        self._claims: dict[str, Request] = {}  # by replica

    def __len__(self) -> int:
        return len(self._claims)

    def engine_for(self, request: Request, now_s: float) -> Replica | None:
        """Return the engine that a suspect can go to now, alone; None if it has to wait."""
        replica = self._claimed_by(request) or self._claim(request, now_s)
        if replica is None:
            return self._half_open(request, now_s)
        if self._num_fresh(replica):
            return None
        is_ready = replica.breaker.admits(replica.info.max_num_seqs)
        return replica if is_ready and kv_need_tokens(request) <= replica.room_tokens else None

    def drop_lapsed(self) -> None:
        """Open the engines whose suspect has got on, or left, or that cannot be used."""
        for replica_id, request in list(self._claims.items()):
            replica = self._fleet.get(replica_id)
            is_sound = replica is not None and _is_sound(replica)
            attempt = self._attempts.get(request.id, replica_id)
            if attempt is not None:
                # On an engine that is lost: until the shell has told how far it had got.
                if not is_sound or attempt.is_fresh:
                    continue
            elif is_sound and request.id in self._queue:
                continue
            del self._claims[replica_id]
            if replica is not None:
                replica.is_quarantined = False
                self._fleet.refresh(replica)

    def _claimed_by(self, request: Request) -> Replica | None:
        for replica_id, holder in self._claims.items():
            if holder.id == request.id:
                return self._fleet.get(replica_id)
        return None

    def _claim(self, request: Request, now_s: float) -> Replica | None:
        """Send nobody else to an engine from now on; None if none may be risked."""
        if any(body_of(holder) == body_of(request) for holder in self._claims.values()):
            return None
        sound = [each for each in self._fleet.working(request.model) if _is_sound(each)]
        # One that has come up since has nobody to lose, and is about to be needed least.
        died_s = self._suspects.died_s(request, now_s)
        restarted = [replica for replica in sound if replica.up_s > died_s]
        candidates = restarted or (sound if len(sound) > 1 else [])
        if not candidates:
            return None
        replica = min(candidates, key=lambda each: (self._num_fresh(each), each.num_sequences))
        self._claims[replica.id] = request
        replica.is_quarantined = True
        self._fleet.refresh(replica)
        return replica

    def _half_open(self, request: Request, now_s: float) -> Replica | None:
        """Return an engine that a suspect is to probe, or nobody might, and it would wait on."""
        for replica in self._fleet.working(request.model):
            is_half_open = replica.breaker.status is BreakerState.HALF_OPEN
            if is_half_open and self._suspects.try_probe(request, now_s):
                return replica
        return None

    def _num_fresh(self, replica: Replica) -> int:
        return sum(attempt.is_fresh for attempt in self._attempts.at_replica(replica))


def _is_sound(replica: Replica) -> bool:
    """Whether what dies there would not have died anyhow; quarantine itself aside."""
    return not replica.is_draining and replica.breaker.status is BreakerState.CLOSED
