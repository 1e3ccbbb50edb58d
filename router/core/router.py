r"""The router: events and `now_s` in, decisions out.

A request's states, and who moves it:

    (new) --on_arrival--> held --room (any event)--> placed --on_finish--> COMPLETED
      |                     |  \                     |   \--`failures`--> as if new,
      |                     |   \--deadline--> EXPIRED           or FAILED
      |                     |\--on_cancel--> RENEGED <--on_cancel--/
      |                     |\--engines late or gone--> at a provider (`router.providers.spillover`)
      |                     \--queue full, and another tenant has less in it--> REJECTED
      \--queue full, unknown model--> REJECTED

New requests are placed at once where possible (`router.core.lifecycle`). One
that its engine does not carry through is placed again, elsewhere if there is an
elsewhere: a retry, or, if its reply had begun, a resumption; only the shell
knows which. Every request ends in exactly one Outcome, and its booking with it.
An id that ended, or never was, is not known any more: events about it change
nothing, so a shell may report an end twice, or late. An id must not be used
again while its request is open.

What never happens: a decision about a request that has ended; a dispatch to a
replica that is draining or lost, or past an open breaker; a new request held past
the queue's bounds.
"""

import random
from collections.abc import Collection

from router.core.choice.chooser import Chooser
from router.core.discipline import Discipline
from router.core.failures import Failures
from router.core.lifecycle import OpenRequests
from router.core.provider_events import ProviderEvents
from router.core.settings import RouterSettings
from router.core.state import RouterState
from router.estimators.lengths.forecast import Lengths
from router.fleet.fleet import Fleet
from router.fleet.health import Health, was_step_slow
from router.fleet.replica import Replica
from router.providers.calls import ProviderCalls
from router.providers.spillover import Spillover
from router.queueing.hold_queue import HoldQueue
from router.resilience.retry_budget import RetryBudget
from router.resilience.suspects import Suspects
from router.scaling.demand import Demand, DemandMeter
from router.scheduling.attempt import Attempt, Attempts
from router.scheduling.hedging import Hedging
from router.scheduling.load_shedding import LoadShedder
from router.scheduling.placer import Placer
from router.scheduling.policies import make_policy
from router.scheduling.predictions import Predictions
from router.scheduling.quarantine import Quarantine
from router.scheduling.wait_time import WaitEstimator
from router.types import (
    BlockUpdate,
    Decision,
    EngineInfo,
    EngineSnapshot,
    Outcome,
    Request,
    Usage,
)


class Router:
    """Decides for every request which engine, when, and whether to wait.

    Pure and synchronous; not thread-safe. After each call the shell carries
    out the decisions in their order, and calls `on_tick` at `next_wake_s()`.
    Without `rng` it draws from a generator seeded by the settings.
    """

    def __init__(self, settings: RouterSettings, rng: random.Random | None = None) -> None:
        self.settings = settings
        self._slow_floor_s = settings.breaker.slow_floor_s  # looked up once
        rng = rng if rng is not None else random.Random(settings.seed)
        self._fleet = Fleet()
        self._queue = HoldQueue(settings)
        self._attempts = Attempts(self._fleet, self._queue)
        self._health = Health(settings, rng)
        self._retries = RetryBudget(settings.retry, now_s=0.0)
        waits = WaitEstimator(self._fleet, self._queue)
        self._calls = ProviderCalls(self._queue)
        self._spillover = Spillover(self._queue, waits, self._calls, settings, rng)
        self._load_shedder = LoadShedder(self._fleet, self._queue, waits, settings)
        self._predictions = Predictions(settings.max_prediction_error)
        self._suspects = Suspects(settings.refuse_s)
        self._placer = Placer(
            self._fleet,
            self._queue,
            self._attempts,
            make_policy(settings.policy, rng, settings.ablate),
            Quarantine(self._fleet, self._queue, self._attempts, self._suspects),
            settings.tpot_target_s,
        )
        self._hedging = Hedging(self._placer, self._attempts, self._retries, settings.hedge_factor)
        self._requests = OpenRequests(
            self._fleet,
            self._queue,
            self._attempts,
            self._placer,
            self._spillover,
            waits,
            self._load_shedder,
            self._retries,
            self._suspects,
            settings,
        )
        self.outcomes = self._requests.outcomes
        self._demand = DemandMeter()
        self.failures = Failures(
            self._fleet,
            self._attempts,
            self._requests,
            self._hedging,
            self._spillover,
            self._suspects,
            settings,
        )
        self.providers = ProviderEvents(self._requests, self._calls, self._spillover)
        self.discipline = Discipline(
            self._fleet,
            self._queue,
            self._attempts,
            self._placer,
            self._predictions,
            settings,
            rng,
        )
        self.chooser = Chooser(self._fleet, self._queue, waits, self._predictions, settings, rng)

    # Requests

    def on_arrival(self, request: Request, now_s: float) -> list[Decision]:
        """Place, hold or reject a new request; ignore one whose id is open."""
        if request.id in self._requests:
            return []
        self._retries.deposit()
        request = self.discipline.rank(request)
        self._demand.record_arrival(request)
        if now_s < self._health.next_check_s:
            return self._requests.admit(request, now_s)
        # Nobody looked while there was no work: an engine may have fallen silent meanwhile.
        # Or one may be due for a look, which may let those go that wait for it.
        return [
            *self._health.check(self._fleet, now_s),
            *self._requests.place_held(now_s),
            *self._requests.admit(request, now_s),
        ]

    def on_answer(self, request_id: str, replica_id: str, now_s: float) -> list[Decision]:
        """Give a request to the engine that answers first; withdraw the other attempt.

        An answer is anything generated, long before the first token where the response comes
        all at once. Call it before `on_first_token` and `on_finish`.
        """
        attempt = self._attempts.get(request_id, replica_id)
        if attempt is None:
            return []
        attempt.mark_answer()
        if attempt.request.failed_calls and not attempt.is_error:
            self.failures.blame_others(attempt, now_s, is_over=False)
        others = self._attempts.others(attempt)
        if not others:
            return []  # the usual case
        for other in others:
            if other.placed_s < attempt.placed_s:
                self._judge_ttft(other, now_s)
        withdrawn = self._hedging.withdraw_others(attempt)
        return [*withdrawn, *self._requests.place_held(now_s)]

    def on_first_token(self, request_id: str, now_s: float) -> list[Decision]:
        """Learn from a first token: compare it with what was predicted."""
        attempt = self._attempts.mark_first_token(request_id, now_s)
        if attempt is None:
            call = self._calls.mark_first_token(request_id, now_s)
            if call is not None and call.request.failed_calls:
                self.failures.blame_others(call, now_s, is_over=False)
            return []
        withdrawn: list[Decision] = []
        if not attempt.has_answered:
            withdrawn = self.on_answer(request_id, attempt.replica.id, now_s)
        if attempt.is_error:
            return withdrawn
        self._predictions.on_first_token(attempt, now_s)
        self._observe(attempt, now_s)
        self._judge_ttft(attempt, now_s)
        if self.discipline.follow():
            return [*withdrawn, *self._requests.place_held(now_s)]
        return withdrawn

    def on_finish(self, request_id: str, usage: Usage | None, now_s: float) -> list[Decision]:
        """End a request that its engine, or provider, has answered: COMPLETED."""
        if (call := self._calls.complete_call(request_id, usage, now_s)) is not None:
            if call.request.failed_calls:
                self.failures.blame_others(call, now_s, is_over=True)
            return self._requests.close(Outcome.COMPLETED, now_s, at_once=True)
        came_at_once = self._attempts.mark_first_token(request_id, now_s) is not None
        if (attempt := self._attempts.oldest(request_id)) is None:
            return []
        withdrawn = self._hedging.withdraw_others(attempt)
        if not attempt.is_error:
            if attempt.request.failed_calls:
                self.failures.blame_others(attempt, now_s, is_over=True)
            if came_at_once:
                self._observe(attempt, now_s)
            attempt.replica.breaker.record_success(attempt.permit, now_s)
            if usage is not None:
                self._predictions.on_finish(attempt, usage, now_s)
                self._demand.record_usage(attempt.request.model, usage)
                self._placer.learn_answer(attempt, usage)
        if self._suspects and self._suspects.acquit(attempt.request):
            self._requests.mark_alike(attempt.request, are_suspects=False)
        return [*withdrawn, *self._requests.end(request_id, Outcome.COMPLETED, now_s, usage)]

    def on_cancel(
        self, request_id: str, now_s: float, usage: Usage | None = None
    ) -> list[Decision]:
        """End a request whose client has left, held or at an engine or provider: RENEGED.

        `usage` is what an engine has spent on it until then, if that is known.
        """
        was_away = self._calls.cancel_call(request_id, now_s)
        if not was_away and self._queue.remove(request_id) is None:
            return self._requests.end(request_id, Outcome.RENEGED, now_s, usage)
        return self._requests.close(Outcome.RENEGED, now_s)

    def on_prompt(
        self, request_id: str, replica_id: str, num_prompt_tokens: int, block_hashes: list[int]
    ) -> None:
        """Learn what an engine has made of a request's prompt, by its own tokeniser."""
        self._placer.learn_prompt(request_id, replica_id, num_prompt_tokens, block_hashes)

    def _observe(self, attempt: Attempt, now_s: float) -> None:
        """Let the policy learn how long a first token, or a whole response, took."""
        latency_s = max(0.0, now_s - attempt.placed_s)
        self._placer.policy.observe(attempt.replica, latency_s, now_s)

    def _judge_ttft(self, attempt: Attempt, now_s: float) -> None:
        """Count a first token that came, or did not come, far too late against its engine.

        Not if the engine was mute meanwhile: it may have had the token long before it said so.
        """
        if attempt.replica.vital_signs.mute_s >= attempt.placed_s:
            return
        ttft_s = max(0.0, now_s - attempt.placed_s)
        if ttft_s > self._slow_floor_s and self.settings.breaker.is_slow(
            ttft_s, attempt.predicted_ttft_s
        ):
            self._health.judge_slow(attempt.replica, [attempt.permit], self._fleet, now_s)

    # Replicas

    def on_replica_up(
        self, replica_id: str, info: EngineInfo, now_s: float, *, is_draining: bool = False
    ) -> list[Decision]:
        """Take in an engine to which there is a connection now.

        A known id means a new connection: the old one, and all that was booked
        on it, is lost. One that `is_draining` gets no work from the first moment on.
        """
        if (lost := self._fleet.remove(replica_id)) is not None:
            self._health.record_loss(lost, now_s)
        breaker = self._health.breaker(replica_id, info, self._fleet, now_s)
        replica = Replica(replica_id, info, now_s, breaker)
        replica.is_draining = is_draining
        self._fleet.add(replica)
        self._placer.fit_fleet()
        return self._requests.place_held(now_s)

    def on_snapshot(
        self, replica_id: str, snapshot: EngineSnapshot, now_s: float
    ) -> list[Decision]:
        """Take in an engine's state; old, repeated or from an unknown engine, ignore it."""
        replica = self._fleet.get(replica_id)
        if replica is None:
            return []
        was_slow = was_step_slow(replica, snapshot, self.settings.breaker)
        if not replica.receive(snapshot, now_s):
            return []
        self._fleet.refresh(replica)
        if replica.predictor.has_learned_much:
            self._fleet.share_step_model(replica)
        if was_slow:
            permits = [attempt.permit for attempt in self._attempts.at_replica(replica)]
            self._health.judge_slow(replica, permits, self._fleet, now_s)
        return self._requests.place_held(now_s)

    def on_alive(
        self, replica_id: str, num_steps_total: int, num_requests: int, now_s: float
    ) -> None:
        """Take in what an engine's core tells of its own life, though snapshots may be late."""
        replica = self._fleet.get(replica_id)
        if replica is not None and replica.vital_signs.receive_alive(
            num_steps_total, num_requests, replica.snapshot_s, now_s
        ):
            self._fleet.refresh(replica)

    def on_blocks(self, replica_id: str, update: BlockUpdate) -> bool:
        """Take in what an engine's prefix cache holds; False if an update was missed.

        Then nothing is taken to be cached there until the shell has got one
        that tells all of it.
        """
        replica = self._fleet.get(replica_id)
        return replica is None or replica.prefix_cache.receive(update)

    def on_replica_draining(
        self, replica_id: str, now_s: float, *, is_draining: bool = True
    ) -> list[Decision]:
        """Send an engine no new work, what it has may finish; or take it back into service."""
        replica = self._fleet.get(replica_id)
        if replica is not None:
            replica.is_draining = is_draining
            self._fleet.refresh(replica)
        return self._requests.place_held(now_s)

    def on_replica_down(self, replica_id: str, now_s: float) -> list[Decision]:
        """Forget an engine and all bookings on it.

        Requests placed there stay open: only the shell knows how far each one
        got, and so reports each by `on_attempt_failed`. If it did not, they
        would stay open for ever.
        """
        if (lost := self._fleet.remove(replica_id)) is not None:
            self._health.record_loss(lost, now_s)
        return self._requests.place_held(now_s)

    # Time and people

    def on_tick(self, now_s: float) -> list[Decision]:
        """Reject what has been held too long; leave the sick; place what can be."""
        decisions: list[Decision] = []
        if now_s >= self._health.next_check_s:
            decisions += self._health.check(self._fleet, now_s)
        decisions += self._requests.place_held(now_s, at_once=True)
        return [*decisions, *self._hedging.hedge_late(now_s)]

    def next_wake_s(self) -> float | None:
        """When to call `on_tick`, whatever happens; None while no request is open."""
        wake_s = self._hedging.next_look_s()
        if len(self._queue):
            wake_s = _earlier(wake_s, self._queue.next_expiry_s())
            wake_s = _earlier(wake_s, self._spillover.next_check_s())
        if len(self._fleet) and (len(self._queue) or len(self._attempts)):
            wake_s = _earlier(wake_s, self._health.next_check_s)
        return wake_s

    def use_lengths(self, lengths: Lengths) -> None:
        """Ask this source from now on how long answers will be."""
        self._predictions.lengths = lengths

    def expect_models(self, names: Collection[str]) -> None:
        """Hold what asks for one of these models, too, before an engine of it is up."""
        self._fleet.expected = frozenset(names)

    def set_policy(self, name: str, now_s: float, ablate: Collection[str] = ()) -> list[Decision]:
        """Choose by another policy from now on, without the parts named in `ablate`.

        It may hold less. Raises `ValueError` for a name not in `POLICIES` and for an unknown part.
        """
        self.discipline.set_policy(name, ablate)
        return self._requests.place_held(now_s)

    def demand(self, models: Collection[str] | None = None) -> Demand:
        """Return how much work has come and waits, for the model of these names; None: for all."""
        num_requests, num_tokens = self._queue.num_held_of(models)
        return self._demand.report(
            self._fleet, models, num_held_requests=num_requests, num_held_tokens=num_tokens
        )

    def state(self, now_s: float) -> RouterState:
        """Return everything worth knowing about the router now."""
        return RouterState(
            policy=self._placer.policy.name,
            ablate=self._placer.policy.ablated,
            holds=self._placer.holds,
            replicas={replica.id: replica.state(now_s) for replica in self._fleet},
            held=self._queue.state(now_s),
            is_overloaded=self._load_shedder.is_overloaded_by_model(now_s),
            num_placed=len(self._attempts),
            prefix_memory=self._placer.prompts.state(),
            outcomes={outcome.value: self.outcomes[outcome] for outcome in Outcome},
            is_by_arrival=self._queue.by_arrival,
            accuracy=self._predictions.state(),
            accuracy_by_model=self._predictions.state_by_model(),
            lengths=self._predictions.lengths_state(),
            fallback=self._spillover.state(now_s),
            hedges=self._hedging.state(),
            suspects=self._suspects.state(),
            retries=self._requests.retries_state(),
            breaker_events=list(self._health.log),
        )


def _earlier(one_s: float | None, other_s: float | None) -> float | None:
    """Return the earlier of two times, None if there is none."""
    if one_s is None or (other_s is not None and other_s < one_s):
        return other_s
    return one_s
