r"""What follows when an engine does not carry a request through, and whose fault was it?

Providers are judged alike for what may be the request's fault, a 500: see `blame_others`.

| what happens                                      | verdict on the engine | on the request     |
|---------------------------------------------------|-----------------------|--------------------|
| an engine gives it back as busy                   | none                  | none, and no retry |
| 4xx                                               | none                  | it is answered     |
| 5xx, or the reply breaks off; another one answers | a failure             | none               |
| 5xx, or the reply breaks off; another one's, too  | none                  | it is at fault     |
| the engine dies or hangs                          | its breaker is open   | suspect, perhaps   |
"""

import msgspec

from router.core.lifecycle import OpenRequests
from router.core.settings import RouterSettings
from router.fleet.fleet import Fleet
from router.fleet.replica import Replica
from router.providers.calls import ProviderAttempt
from router.providers.spillover import Spillover
from router.resilience.breaker import Failure, TripReason
from router.resilience.suspects import PROVEN_TOKENS, Suspects
from router.scheduling.attempt import Attempt, Attempts
from router.scheduling.hedging import Hedging
from router.types import Decision, Fail, FailedCall, Outcome, Withdraw

# HTTP status of replies that may tell of the engine's trouble rather than of the request's.
_ENGINE_ERRORS = frozenset((500, 502, 503, 504))
# Between an engine's step and the snapshot that tells of it, about.
_REPORT_S = 0.05


class Failures:
    """Takes in failed attempts: the request goes on elsewhere, or it ends; breakers hear of it."""

    def __init__(
        self,
        fleet: Fleet,
        attempts: Attempts,
        requests: OpenRequests,
        hedging: Hedging,
        spillover: Spillover,
        suspects: Suspects,
        settings: RouterSettings,
    ) -> None:
        self._fleet = fleet
        self._attempts = attempts
        self._requests = requests
        self._hedging = hedging
        self._spillover = spillover
        self._suspects = suspects
        self._settings = settings
        # How many were fresh on the engine lost last, whose attempts are reported one by one.
        self._lost: tuple[Replica | None, int] = (None, 0)

    def on_attempt_failed(
        self,
        request_id: str,
        replica_id: str,
        failure: Failure | None,
        now_s: float,
        *,
        can_retry: bool = True,
        has_begun: bool = False,
        num_output_tokens: int = 0,
    ) -> list[Decision]:
        """Leave a request to its other attempt, place it again, or give it up.

        `failure` is what the engine did to this request alone: the retry counts against the
        budget, and the failure for the breaker if the request fares better elsewhere. None
        where the engine as a whole was lost or left: then its breaker keeps a storm off, and
        what the other engines get is no more than it had; but the request may be why
        (`router.resilience.suspects`). The shell knows whether it `can_retry`,
        whether the reply `has_begun`, so that only an engine can go on with it, and how many
        tokens this engine has generated that another will have to prefill.
        """
        attempt = self._attempts.get(request_id, replica_id)
        if attempt is None:
            return []
        if failure is None:
            self._judge_loss(attempt, num_output_tokens, now_s)
        else:
            self._keep_failed_call(attempt)
        if not can_retry:
            return [Fail(request_id), *self._requests.end(request_id, Outcome.FAILED, now_s)]
        if self._attempts.others(attempt):
            self._hedging.end_in_favour(attempt)
            return self._requests.place_held(now_s)
        return self._requests.retry(
            attempt,
            now_s,
            costs_retry=failure is not None,
            has_begun=has_begun,
            num_output_tokens=num_output_tokens,
        )

    def on_refused_as_busy(self, request_id: str, replica_id: str, now_s: float) -> list[Decision]:
        """Take back a request that an engine has not begun, as others had sent it work meanwhile.

        No failure, and no retry. Call `Router.on_snapshot` first: with what the engine has now.
        """
        attempt = self._attempts.get(request_id, replica_id)
        if attempt is None:
            return []
        if self._attempts.others(attempt):
            self._hedging.end_in_favour(attempt)
            return self._requests.place_held(now_s)
        return self._requests.take_back(attempt, now_s)

    def on_error_reply(
        self,
        request_id: str,
        replica_id: str,
        now_s: float,
        *,
        status: int,
        can_retry: bool,
        has_begun: bool,
        num_output_tokens: int,
    ) -> list[Decision]:
        """Hear that an engine answers with an HTTP error. Return [] to let the client have it.

        A client's error (4xx) is no verdict on the engine. An engine's (5xx) may be the request's
        fault or the engine's: it is tried once more, elsewhere if there is an elsewhere. Only if
        that goes well it was the engine's; the second one that says so is believed. The
        other arguments are those of `on_attempt_failed`.
        """
        attempt = self._attempts.get(request_id, replica_id)
        if attempt is None:
            return []
        attempt.is_error = True
        is_hedged = bool(self._attempts.others(attempt))
        is_believed = bool(attempt.request.failed_calls) and not is_hedged
        if status not in _ENGINE_ERRORS or (is_believed and not has_begun):
            return []
        withdraw = Withdraw(request_id, replica_id, attempt.booking)
        decisions = self.on_attempt_failed(
            request_id,
            replica_id,
            Failure.ERROR,
            now_s,
            can_retry=can_retry and not is_believed,
            has_begun=has_begun,
            num_output_tokens=num_output_tokens,
        )
        return [withdraw, *decisions]

    def blame_others(
        self, attempt: Attempt | ProviderAttempt, now_s: float, *, is_over: bool
    ) -> None:
        """Count failures against the engines and providers that this attempt has got further than.

        It answers: then those that had not. `is_over`: all of them.
        """
        left = []
        for call in attempt.request.failed_calls:
            if call.had_answered and not is_over:
                left.append(call)
            elif (replica := self._fleet.get(call.callee)) is not None:
                replica.breaker.record_late_failure(call.permit, Failure.ERROR, now_s)
                self._fleet.refresh(replica)
            elif (key := self._spillover.find_key(call.callee)) is not None:
                key.breaker.record_late_failure(call.permit, Failure.ERROR, now_s)
        attempt.request = msgspec.structs.replace(attempt.request, failed_calls=tuple(left))

    def _keep_failed_call(self, attempt: Attempt) -> None:
        """Keep a failed call in mind without a verdict, until it shows whose fault it was."""
        call = FailedCall(attempt.replica.id, attempt.permit, attempt.has_answered)
        for each in self._attempts.of(attempt.request.id):
            calls = (*each.request.failed_calls, call)
            each.request = msgspec.structs.replace(each.request, failed_calls=calls)

    def _was_only_one(self, attempt: Attempt, now_s: float) -> bool:
        """Whether nobody else was fresh on the engine when it was lost."""
        replica, _ = self._lost
        if replica is not attempt.replica:
            on_board = self._attempts.at_replica(attempt.replica)
            num_fresh = sum(each.is_fresh and not self._is_late(each, now_s) for each in on_board)
            self._lost = attempt.replica, num_fresh
        return self._lost[1] == 1

    def _is_late(self, attempt: Attempt, now_s: float) -> bool:
        """Whether a request came when the step had begun that never ended."""
        waited_s, _ = attempt.replica.step_wait_s(now_s)  # since it last got on
        return waited_s > self._settings.hang_s and attempt.placed_s > now_s - waited_s + _REPORT_S

    def _judge_loss(self, attempt: Attempt, num_output_tokens: int, now_s: float) -> None:
        """Suspect a request of the loss of its engine, or refuse it, if it may be why.

        The engine has generated `num_output_tokens` for it.
        """
        was_only_one = self._was_only_one(attempt, now_s)  # counted at the first report
        if num_output_tokens >= PROVEN_TOKENS or attempt.is_probe or self._is_late(attempt, now_s):
            return
        reason = attempt.replica.breaker.reason
        is_trouble = reason in (TripReason.LOST, TripReason.HUNG)
        # One that falls silent may have lost its network, and a server that somebody else runs is
        # stopped and started, or slow, without our knowing. Two under one request are too many.
        if reason is TripReason.STALE or (is_trouble and attempt.replica.info.is_external):
            if not attempt.request.num_stuck:
                return
        elif not is_trouble:
            return
        if attempt.is_alone and was_only_one:
            self._suspects.refuse(attempt.request, now_s)
        else:
            self._suspects.accuse(attempt.request, now_s)
            self._requests.mark_alike(attempt.request, are_suspects=True)
