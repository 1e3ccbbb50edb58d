"""How does a request enter, go on, and end?

A request is open from `admit` until its one Outcome is counted here, and all
that time it is in exactly one place:

    at an engine     `Attempts`, one or two; it leaves by `end`, or by `retry` to be placed again
    in the queue     `HoldQueue`; it leaves for an engine or a provider, or expires
    at a provider    `ProviderCalls`; it leaves by the provider's word, or the client's

What can go nowhere at once is held, or refused where holding it is of no use:
the queue is full, it would expire before it is served, its first token would be far too
late, or nobody may serve it.
"""

import math
from collections import Counter

import msgspec

from router.core.settings import RouterSettings
from router.core.state import RetriesState
from router.fleet.fleet import Fleet
from router.providers.spillover import Spillover
from router.queueing.hold_queue import HoldQueue
from router.queueing.model_queue import queue_name
from router.resilience.retry_budget import RetryBudget
from router.resilience.suspects import Suspects, body_of
from router.scheduling.attempt import Attempt, Attempts
from router.scheduling.load_shedding import LoadShedder
from router.scheduling.placer import Placer
from router.scheduling.wait_time import WaitEstimator
from router.types import Decision, Fail, Hold, Outcome, Reject, RejectReason, Request, Usage

# Times `max_attempts` that engines may fail under a reply that gets on between: a bound on
# what a request can do that ends each engine a little later than the one before.
_MAX_MOVES = 3


class OpenRequests:
    """Puts requests where they can go: at once, or as room and time allow."""

    def __init__(
        self,
        fleet: Fleet,
        queue: HoldQueue,
        attempts: Attempts,
        placer: Placer,
        spillover: Spillover,
        waits: WaitEstimator,
        load_shedder: LoadShedder,
        retries: RetryBudget,
        suspects: Suspects,
        settings: RouterSettings,
    ) -> None:
        self.outcomes: Counter[Outcome] = Counter()
        self.num_retries = 0  # resumptions included
        self._num_bounced = 0  # given back by engines as busy
        self._retries = retries
        self._suspects = suspects
        self._settings = settings
        self._fleet = fleet
        self._queue = queue
        self._attempts = attempts
        self._placer = placer
        self._spillover = spillover
        self._waits = waits
        self._load_shedder = load_shedder

    def __contains__(self, request_id: object) -> bool:
        return (
            request_id in self._attempts
            or request_id in self._queue
            or request_id in self._spillover.calls
        )

    # In

    def admit(self, request: Request, now_s: float) -> list[Decision]:
        """Place, hold or reject a new request."""
        if self._is_unknown(request.model):
            return [self._reject(request, RejectReason.UNKNOWN_MODEL, None)]
        if self._suspects and self._suspects.is_suspect(request, now_s):
            if self._suspects.is_refused(request, now_s):
                return [self._refuse(request, now_s)]
            request = msgspec.structs.replace(request, is_suspect=True)
        return self.enter(request, now_s)

    def enter(self, request: Request, now_s: float) -> list[Decision]:
        """Place, hold or reject a request that is in no place, new or to be placed again."""
        # It passes no held request: what is held could not be placed now either, or would have
        # been by the event that made room; and an engine reserved for one does not take this.
        dispatch = self._placer.place(request, now_s)
        if dispatch is not None:
            self._load_shedder.record_admitted(request, now_s)
            return [dispatch]
        decisions = self._expire(now_s)
        expires_s = self._queue.expires_s(request)
        if expires_s <= now_s:
            decisions.append(self._reject(request, RejectReason.EXPIRED, None))
        elif self._is_unknown(request.model):  # unloaded while it was with an engine
            decisions.append(self._reject(request, RejectReason.UNKNOWN_MODEL, None))
        elif self._is_hopeless(request, now_s):
            decisions.append(self._give_up(request, now_s))
        elif (
            not request.num_bounces
            and (late_s := self._service_start_s(request, now_s) - expires_s) > 0.0
        ):
            # Held, it would only take room until it expired. Once the queue is shorter by that
            # much, a request like it would be in time.
            decisions.append(self._turn_away(request, RejectReason.HOPELESS, late_s, now_s))
        elif (again_s := self._load_shedder.refuse_if_late(request, now_s)) is not None:
            decisions.append(self._turn_away(request, RejectReason.OVERLOADED, again_s, now_s))
        elif not self._queue.push(request):
            decisions += self._make_room(request, now_s)
        # A request that is not the head of its queue changes nothing for the others.
        if decisions or self._spillover.providers or self._queue.is_head(request):
            at_once = not self._fleet.any_works(request.model)
            decisions += self._dispatch_held(now_s, at_once=at_once)
        if request.id in self._queue:
            decisions.append(Hold(request.id))
        return decisions

    def _is_unknown(self, model: str) -> bool:
        """Whether nobody serves a model, and nobody who might is starting."""
        # While no engine is there at all, any of them may be the one that is starting.
        return (
            len(self._fleet) > 0
            and not self._fleet.knows(model)
            and not self._spillover.quotes.serves(model)
        )

    # On

    def retry(
        self,
        attempt: Attempt,
        now_s: float,
        *,
        costs_retry: bool,
        has_begun: bool,
        num_output_tokens: int,
    ) -> list[Decision]:
        """Place a request again whose only attempt has failed, or give it up.

        The engine has generated `num_output_tokens` that another will have to prefill.
        `costs_retry` if it goes elsewhere out of the retry budget; past the last one a provider
        may have it. It keeps its first arrival, so it has not lost its place in the order.
        """
        self._attempts.end(attempt, Usage())  # it is charged anew where it goes next
        again = retried(
            attempt.request, attempt.replica.id, num_output_tokens, now_s, has_begun=has_begun
        )
        if has_begun and attempt.replica.info.is_external:
            again = msgspec.structs.replace(again, begun_externally=True)
        if self._suspects and self._suspects.is_suspect(again, now_s):
            again = msgspec.structs.replace(again, is_suspect=True)
            if self._suspects.is_refused(again, now_s):
                return [*self._refuse_body(again, now_s), *self.place_held(now_s)]
        is_over = self._is_stuck(again, costs_retry=costs_retry) or (
            costs_retry and not self._retries.try_withdraw(now_s)
        )
        # Elsewhere a suspect is no danger, and need not wait for an engine of its own.
        if again.is_suspect and (fallback := self._spillover.send_now(again, now_s)) is not None:
            decisions: list[Decision] = [fallback]
        elif not is_over:
            decisions = self.enter(again, now_s)
        elif (fallback := self._spillover.send_now(again, now_s)) is not None:
            decisions = [fallback]
        else:
            return [Fail(again.id), *self.close(Outcome.FAILED, now_s)]
        self.num_retries += 1
        return [*decisions, *self.place_held(now_s)]  # in the room that is free now

    def take_back(self, attempt: Attempt, now_s: float) -> list[Decision]:
        """Place or hold again a request that its engine gave back as busy.

        It keeps its place in the order, and no bound of the queue is for it.
        """
        self._attempts.end(attempt, Usage())  # it is charged anew where it goes next
        self._num_bounced += 1
        num_bounces = attempt.request.num_bounces + 1
        again = msgspec.structs.replace(attempt.request, num_bounces=num_bounces)
        return [*self.enter(again, now_s), *self.place_held(now_s)]

    def retries_state(self) -> RetriesState:
        """Return how often requests were sent on."""
        return RetriesState(
            num_made=self.num_retries, budget=self._retries.state(), num_bounced=self._num_bounced
        )

    def mark_alike(self, request: Request, *, are_suspects: bool) -> None:
        """Have what is held of a request's body wait for an engine of its own, or no longer."""
        now_in = queue_name(msgspec.structs.replace(request, is_suspect=not are_suspects))
        for held in self._held_alike(request, now_in):
            self._queue.remove(held.id)
            self._queue.push(msgspec.structs.replace(held, is_suspect=are_suspects))

    def _held_alike(self, request: Request, queue: str) -> list[Request]:
        """Return the held requests of the same body."""
        body = body_of(request)
        return [held for held in self._queue.in_order(queue) if body_of(held) == body]

    def _refuse_body(self, request: Request, now_s: float) -> list[Decision]:
        """End a request that is refused, and all of the same body that are held."""
        same = self._held_alike(request, queue_name(request))
        for held in same:
            self._queue.remove(held.id)
        return [self._refuse(each, now_s) for each in (request, *same)]

    def _refuse(self, request: Request, now_s: float) -> Decision:
        """Refuse a request under whose like engines die."""
        self._suspects.num_rejected += 1
        if request.has_begun:
            self.outcomes[Outcome.FAILED] += 1
            return Fail(request.id)
        until_s = self._suspects.refused_until_s(request, now_s)
        return self._reject(request, RejectReason.ENDS_ENGINES, until_s - now_s)

    def _is_stuck(self, request: Request, *, costs_retry: bool) -> bool:
        """Whether engines fail under a request again and again without its reply getting on.

        Whether it ends engines is for `router.resilience.suspects` to say.
        """
        most = self._settings.max_attempts
        is_stuck = costs_retry and request.num_stuck >= most
        return is_stuck or len(request.tried) >= _MAX_MOVES * most

    def place_held(self, now_s: float, *, at_once: bool = False) -> list[Decision]:
        """Reject what has been held too long, place what can be.

        Providers are considered every 50 ms only, unless `at_once`.
        """
        if not len(self._queue) and not (
            self._placer.has_lapsing or self._waits.was_any_waiting or self._spillover.providers
        ):
            return []  # the usual case
        return [*self._expire(now_s), *self._dispatch_held(now_s, at_once=at_once)]

    def _dispatch_held(self, now_s: float, *, at_once: bool) -> list[Decision]:
        """Place what engines have room for. Send to providers what should not wait for them."""
        dispatches = self._placer.place_held(now_s)
        num_tokens: dict[str, int] = {}
        for dispatch in dispatches:
            if (attempt := self._attempts.oldest(dispatch.request_id)) is not None:
                model, num_more = attempt.request.model, attempt.request.num_prompt_tokens
                num_tokens[model] = num_tokens.get(model, 0) + num_more
        self._waits.record_departures(num_tokens, now_s)
        return [*dispatches, *self._spillover.send_held(now_s, at_once=at_once)]

    # Out

    def end(
        self, request_id: str, outcome: Outcome, now_s: float, usage: Usage | None = None
    ) -> list[Decision]:
        """End a request at engines, if there is one of this id; its room may let others go."""
        attempts = self._attempts.of(request_id)
        if not attempts:
            return []
        for hedge in attempts[1:]:
            self._attempts.end(hedge, Usage())
        self._attempts.end(attempts[0], usage)
        return self.close(outcome, now_s)

    def close(self, outcome: Outcome, now_s: float, *, at_once: bool = False) -> list[Decision]:
        """Count the end of a request, and place what is held; see `place_held`."""
        self.outcomes[outcome] += 1
        return self.place_held(now_s, at_once=at_once)

    def _make_room(self, request: Request, now_s: float) -> list[Decision]:
        """Hold a request in place of others that a full queue holds, or refuse it."""
        leaving = self._queue.make_room(request)
        if leaving:
            self._queue.push(request)
        return [
            self._turn_away(each, RejectReason.QUEUE_FULL, self._time_to_empty_s(each.model), now_s)
            for each in leaving or [request]
        ]

    def _turn_away(
        self, request: Request, reason: RejectReason, retry_after_s: float | None, now_s: float
    ) -> Decision:
        """Send a request that cannot be held to a provider, or refuse it."""
        if self._spillover.settings.spill != "unavailable" or not self._fleet.any_works(
            request.model
        ):
            fallback = self._spillover.send_now(request, now_s)
            if fallback is not None:
                return fallback
        return self._reject(request, reason, retry_after_s)

    def _give_up(self, request: Request, now_s: float) -> Decision:
        """End a request that no engine and no budget will serve in time."""
        if request.tried:
            self.outcomes[Outcome.FAILED] += 1
            return Fail(request.id)
        wait_s = self._spillover.quotes.wait_s(request, now_s)
        retry_after_s = None if math.isinf(wait_s) else wait_s
        return self._reject(request, RejectReason.NO_BUDGET, retry_after_s)

    def _expire(self, now_s: float) -> list[Decision]:
        return [
            self._reject(request, RejectReason.EXPIRED, None)
            for request in self._queue.expire(now_s)
        ]

    def _reject(
        self, request: Request, reason: RejectReason, retry_after_s: float | None
    ) -> Reject:
        """Return the refusal, with its outcome counted."""
        expired = reason is RejectReason.EXPIRED
        self.outcomes[Outcome.EXPIRED if expired else Outcome.REJECTED] += 1
        return Reject(request.id, reason, retry_after_s)

    # What holding a request would come to

    def _is_hopeless(self, request: Request, now_s: float) -> bool:
        """Whether only providers serve the model, and no budget has room in time."""
        if self._fleet.knows(request.model) or not self._spillover.quotes.serves(request.model):
            return False
        return now_s + self._spillover.quotes.wait_s(request, now_s) >= self._queue.expires_s(
            request
        )

    def _service_start_s(self, request: Request, now_s: float) -> float:
        """Return when what is held before a request will have been prefilled, as predicted.

        `now_s` where nothing is known of engines that could do it.
        """
        num_tokens = self._queue.num_tokens_by_model.get(request.model, 0)
        wait_s = self._fleet.time_to_prefill_s(request.model, num_tokens)
        if wait_s is None:
            return now_s
        if now_s + wait_s > self._queue.expires_s(request):  # look closer: some come after it
            num_tokens = self._queue.num_tokens_before(request)
            wait_s = self._fleet.time_to_prefill_s(request.model, num_tokens)
        return now_s + (wait_s or 0.0)

    def _time_to_empty_s(self, model: str) -> float | None:
        """Return the predicted seconds until the queue is empty; None if no engine empties it.

        The queues of all models empty side by side, so the slowest counts. By prefill rates
        alone: true while prefill is what engines are short of.
        """
        held = {model: 0} | self._queue.num_tokens_by_model
        waits_s = [
            self._fleet.time_to_prefill_s(name, num_tokens) for name, num_tokens in held.items()
        ]
        return max((wait_s for wait_s in waits_s if wait_s is not None), default=None)


def retried(
    request: Request, replica_id: str, num_output_tokens: int, now_s: float, *, has_begun: bool
) -> Request:
    """Return the request as it is after an engine generated tokens that another has to prefill.

    They join the prompt, whose text blocks then cover less of it.
    """
    return msgspec.structs.replace(
        _grown(request, num_output_tokens),
        tried=(*request.tried, replica_id),
        num_stuck=1 if num_output_tokens > 0 else request.num_stuck + 1,
        retried_s=now_s,
        has_begun=has_begun,
    )


def continued(request: Request, num_output_tokens: int) -> Request:
    """Return a request for the rest of a reply of which a provider has sent so many tokens."""
    most = request.max_output_tokens
    return msgspec.structs.replace(
        _grown(request, num_output_tokens),
        max_output_tokens=None if most is None else max(1, most - num_output_tokens),
        has_begun=True,
    )


def _grown(request: Request, num_output_tokens: int) -> Request:
    num_prompt_tokens = request.num_prompt_tokens + num_output_tokens
    share = request.num_prompt_tokens / max(1, num_prompt_tokens)  # of what it was before
    return msgspec.structs.replace(
        request,
        num_prompt_tokens=num_prompt_tokens,
        prefix_block_share=request.prefix_block_share * share,
        answered_share=request.answered_share * share,
    )
