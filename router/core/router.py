r"""The router: events and `now_s` in, decisions out.

A request's states, and who moves it:

    (new) --on_arrival--> held --room (any event)--> placed --on_finish--> COMPLETED
      |                     |  \                     |   \--on_attempt_failed--> as if new,
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
from collections.abc import Collection, Sequence

import msgspec

from router.core.lifecycle import OpenRequests
from router.core.remainder import continued, retried
from router.core.state import RetriesState, RouterState
from router.fleet.fleet import Fleet
from router.fleet.health import Health
from router.fleet.replica import Replica
from router.limits.rate_limit import RateReport
from router.providers.calls import ProviderCalls
from router.providers.provider import MakeBudget, ProviderSettings
from router.providers.spillover import FallbackSettings, Spillover, own_budget
from router.queueing.deadline import edf_key_s
from router.queueing.hold_queue import HoldQueue
from router.resilience.breaker import Failure
from router.resilience.retry_budget import RetryBudget
from router.scheduling.hedging import Hedges
from router.scheduling.load_shedding import LoadShedder
from router.scheduling.placer import Placer
from router.scheduling.policies import Policy, make_policy
from router.scheduling.predictions import Predictions
from router.scheduling.wait_time import WaitEstimator
from router.settings import RouterSettings
from router.types import (
    BlockUpdate,
    Decision,
    EngineInfo,
    EngineSnapshot,
    Fail,
    Outcome,
    Request,
    Usage,
)

# Attempts at one request, after which the request itself is the likely cause of its failures.
_MAX_TRIED = 6
# Times `max_attempts` that engines may fail under a reply that gets on between: a bound on
# what a request can do that ends each engine a little later than the one before.
_MAX_MOVES = 3


class Router:
    """Decides for every request which engine, when, and whether to wait.

    Pure and synchronous; not thread-safe. After each call the shell carries
    out the decisions in their order, and calls `on_tick` at `next_wake_s()`.
    Without `rng` it draws from a generator seeded by the settings.
    """

    def __init__(self, settings: RouterSettings, rng: random.Random | None = None) -> None:
        self.settings = settings
        self.num_retries = 0  # resumptions included
        self._rng = rng if rng is not None else random.Random(settings.seed)
        self._fleet = Fleet()
        self._queue = HoldQueue(settings)
        self._health = Health(settings, self._rng)
        self._retries = RetryBudget(settings.retry, now_s=0.0)
        waits = WaitEstimator(self._fleet, self._queue)
        self._calls = ProviderCalls(self._queue)
        self._spill = Spillover(self._queue, waits, self._calls, settings, self._rng)
        self._overloads = LoadShedder(self._fleet, self._queue, waits, settings)
        self._predictions = Predictions(settings.max_prediction_error)
        policy = make_policy(settings.policy, self._rng, settings.ablate)
        self._placer = Placer(
            self._fleet, self._queue, policy, holds=True, tpot_targets_s=settings.tpot_target_s
        )
        self._hedges = Hedges(self._placer, self._queue, self._retries, settings.hedge_factor)
        self._open = OpenRequests(
            self._fleet, self._queue, self._placer, self._spill, waits, self._overloads
        )
        self.outcomes = self._open.outcomes
        self._use(policy)

    # Requests

    def on_arrival(self, request: Request, now_s: float) -> list[Decision]:
        """Place, hold or reject a new request; one whose id is open is ignored."""
        if request.id in self._open:
            return []
        self._retries.deposit()
        s_per_token = self._fleet.prefill_s_per_token(request.model)
        has_length = "length" not in self._placer.policy.ablated
        request = self._predictions.on_arrival(request, s_per_token, has_length=has_length)
        if self._placer.holds and not self._queue.by_arrival:
            request = msgspec.structs.replace(request, edf_key_s=edf_key_s(request, self.settings))
        if now_s < self._health.next_check_s:
            return self._open.admit(request, now_s)
        # Nobody looked while there was no work: an engine may have fallen silent meanwhile.
        # Or one may be looked at whose turn to be called has come: then that is for who waits.
        return [
            *self._health.check(self._fleet, now_s),
            *self._open.place_held(now_s),
            *self._open.admit(request, now_s),
        ]

    def on_first_token(self, request_id: str, now_s: float) -> list[Decision]:
        """Learn from a first token: compare it with what was predicted."""
        has_room = self._hedges.drop(request_id)
        placement = self._placer.start(request_id, now_s)
        if placement is not None:
            ttft_s = max(0.0, now_s - placement.placed_s)
            self._predictions.on_first_token(placement, now_s)
            self._placer.policy.observe(placement.replica, ttft_s, now_s)
            if self.settings.breaker.is_slow(ttft_s, placement.predicted_ttft_s):
                self._health.judge_slow([placement], self._fleet, now_s)
            if self._use(self._placer.policy) or has_room:
                return self._open.place_held(now_s)
        else:
            self._calls.start(request_id, now_s)
        return []

    def on_progress(self, request_id: str) -> None:
        """Learn that an engine generates a reply which comes all at once: no second is wanted."""
        if (placement := self._placer.get(request_id)) is not None:
            placement.is_under_way = True
        self._hedges.drop(request_id)

    def on_hedge_won(
        self, request_id: str, failure: Failure | None, now_s: float
    ) -> list[Decision]:
        """The second engine answers first, or alone: `failure` is what the first one did, if any.

        Call it before `on_first_token`.
        """
        first = self._placer.get(request_id)
        if first is None or self._hedges.get(request_id) is None:
            return []
        if failure is not None:
            first.replica.breaker.fail(first.permit, failure, now_s)
        elif self.settings.breaker.is_slow(now_s - first.placed_s, first.predicted_ttft_s):
            self._health.judge_slow([first], self._fleet, now_s)
        self._hedges.win(first)
        return self._open.place_held(now_s)

    def on_hedge_failed(
        self, request_id: str, failure: Failure | None, now_s: float
    ) -> list[Decision]:
        """The second engine will not answer; the first one still may."""
        if (second := self._hedges.get(request_id)) is None:
            return []
        if failure is not None:
            second.replica.breaker.fail(second.permit, failure, now_s)
        self._hedges.drop(request_id)
        return self._open.place_held(now_s)

    def on_finish(self, request_id: str, usage: Usage | None, now_s: float) -> list[Decision]:
        """End a request that its engine, or provider, has answered: COMPLETED."""
        if self._calls.finish(request_id, usage, now_s):
            return self._open.close(Outcome.COMPLETED, now_s, at_once=True)
        self._hedges.drop(request_id)
        placement = self._placer.start(request_id, now_s)
        if placement is not None:  # the whole response came at once
            latency_s = max(0.0, now_s - placement.placed_s)
            self._placer.policy.observe(placement.replica, latency_s, now_s)
        if (placement := self._placer.get(request_id)) is not None:
            placement.replica.breaker.succeed(placement.permit, now_s)
            if usage is not None:
                self._predictions.on_finish(placement, usage, now_s)
        return self._open.end(request_id, Outcome.COMPLETED, now_s, usage)

    def on_attempt_failed(
        self,
        request_id: str,
        failure: Failure | None,
        now_s: float,
        *,
        can_retry: bool = True,
        has_begun: bool = False,
        num_output_tokens: int = 0,
    ) -> list[Decision]:
        """Place a request again that its engine did not carry through, or give it up.

        Through no fault of the client's; past the last retry a provider may have
        it. `failure` is what the engine did to this request alone: it counts for
        the breaker, and the retry against the budget. None where the engine as a
        whole was lost or left: then its breaker keeps a storm off, and what the
        other engines get is no more than it had. The shell knows whether it
        `can_retry`, whether the reply `has_begun`, so that only an engine can go
        on with it, and how many tokens this engine has generated that another
        will have to prefill.

        The request keeps its first arrival, so it has not lost its turn.
        """
        self._hedges.drop(request_id)  # one that might have gone on has taken over before
        placement = self._placer.get(request_id)
        if placement is None:
            return []
        request, replica = placement.request, placement.replica
        if failure is not None:
            replica.breaker.fail(placement.permit, failure, now_s)
        if not can_retry:
            return [Fail(request_id), *self._open.end(request_id, Outcome.FAILED, now_s)]
        self._open.take_back(placement, Usage())  # it is charged anew where it goes next
        again = retried(request, replica.id, num_output_tokens, now_s, has_begun=has_begun)
        no_engine = self._is_suspect(again) or (
            failure is not None and not self._retries.try_withdraw(now_s)
        )
        decision: Decision | None = None
        if no_engine and (decision := self._spill.send_now(again, now_s)) is None:
            return [Fail(request_id), *self._open.close(Outcome.FAILED, now_s)]
        self.num_retries += 1
        decisions = self._open.enter(again, now_s) if decision is None else [decision]
        return [*decisions, *self._open.place_held(now_s)]  # in the room that it has left

    def _is_suspect(self, request: Request) -> bool:
        """Whether engines fail because of a request, rather than under it.

        One that ends them does so at the same token again and again; one whose
        reply got further each time was just there.
        """
        most = self.settings.max_attempts
        return request.num_stuck >= most or len(request.tried) >= _MAX_MOVES * most

    def on_cancel(self, request_id: str, now_s: float) -> list[Decision]:
        """End a request whose client has left, held or placed: RENEGED."""
        self._hedges.drop(request_id)
        was_away = self._calls.cancel(request_id, now_s)
        if not was_away and self._queue.remove(request_id) is None:
            return self._open.end(request_id, Outcome.RENEGED, now_s)
        return self._open.close(Outcome.RENEGED, now_s)

    def on_prompt(self, request_id: str, num_prompt_tokens: int, block_hashes: list[int]) -> None:
        """Learn what an engine has made of a request's prompt, by its own tokeniser."""
        self._placer.learn_prompt(request_id, num_prompt_tokens, block_hashes)

    # Providers

    def use_providers(
        self,
        providers: Sequence[ProviderSettings],
        settings: FallbackSettings,
        now_s: float,
        make_budget: MakeBudget = own_budget,
    ) -> list[Decision]:
        """Go by these providers, in their order, from now on.

        What is known of those of the same name stays; requests at one that is
        gone end there.
        """
        self._spill.use(providers, settings, make_budget, now_s)
        return self._open.place_held(now_s, at_once=True)

    def on_provider_answer(
        self, request_id: str, report: RateReport, now_s: float
    ) -> list[Decision]:
        """Take in that a provider has begun to answer, and what it says of its limits."""
        self._calls.count(request_id, report, now_s)
        return []

    def on_provider_refused(
        self, request_id: str, report: RateReport, now_s: float
    ) -> list[Decision]:
        """Place a request again that a provider refused for its rate: 429."""
        request = self._calls.refuse(request_id, report, now_s)
        if request is None:
            return []
        return (
            self._go_on(request, now_s) if request.has_begun else self._open.enter(request, now_s)
        )

    def on_provider_failed(
        self,
        request_id: str,
        failure: Failure,
        now_s: float,
        *,
        can_retry: bool = True,
        num_output_tokens: int | None = None,
        was_sent: bool = True,
        lasts: bool = False,
    ) -> list[Decision]:
        """Place a request again that a provider did not carry through, or give it up.

        `can_retry` while nothing of the answer has been passed on; after that another
        provider may go on with it, if `num_output_tokens` tells how many this one has
        sent; `was_sent` unless the provider never saw the request; `lasts` if whatever
        is sent under this key would fail in the same way.
        """
        request = self._calls.fail(request_id, failure, was_sent=was_sent, lasts=lasts, now_s=now_s)
        if request is None:
            return []
        if can_retry and len(request.tried) < _MAX_TRIED:
            return self._open.enter(request, now_s)
        if num_output_tokens is not None and len(request.tried) < _MAX_TRIED:
            return self._go_on(continued(request, num_output_tokens), now_s)
        return [Fail(request_id), *self._open.close(Outcome.FAILED, now_s, at_once=True)]

    def _go_on(self, request: Request, now_s: float) -> list[Decision]:
        """Have another provider go on at once with what one has begun, or give it up."""
        if (fallback := self._spill.go_on(request, now_s)) is None:
            return [Fail(request.id), *self._open.close(Outcome.FAILED, now_s, at_once=True)]
        self.num_retries += 1
        return [fallback, *self._open.place_held(now_s)]

    # Replicas

    def on_replica_up(self, replica_id: str, info: EngineInfo, now_s: float) -> list[Decision]:
        """Take in an engine to which there is a connection now.

        A known id means a new connection: the old one, and all that was booked
        on it, is lost.
        """
        if (lost := self._fleet.remove(replica_id)) is not None:
            self._health.lose(lost, now_s)
        breaker = self._health.breaker(replica_id, info, self._fleet, now_s)
        self._fleet.add(Replica(replica_id, info, now_s, breaker))
        return self._open.place_held(now_s)

    def on_snapshot(
        self, replica_id: str, snapshot: EngineSnapshot, now_s: float
    ) -> list[Decision]:
        """Take in an engine's state; old, repeated or from an unknown engine, ignore it."""
        replica = self._fleet.get(replica_id)
        if replica is None:
            return []
        was_slow = replica.was_step_slow(snapshot, self.settings.breaker)
        if not replica.receive(snapshot, now_s):
            return []
        self._fleet.refresh(replica)
        if replica.predictor.has_learned_much:
            self._fleet.learn(replica)
        if was_slow:
            self._health.judge_slow(self._placer.on(replica), self._fleet, now_s)
        return self._open.place_held(now_s)

    def on_blocks(self, replica_id: str, update: BlockUpdate) -> bool:
        """Take in what an engine's prefix cache holds; False if an update was missed.

        Then nothing is taken to be cached there until the shell has got one
        that tells all of it.
        """
        replica = self._fleet.get(replica_id)
        return replica is None or replica.prefix_cache.receive(update)

    def on_replica_draining(self, replica_id: str, now_s: float) -> list[Decision]:
        """Send an engine no new work; what it has may finish."""
        replica = self._fleet.get(replica_id)
        if replica is not None:
            replica.is_draining = True
            self._fleet.refresh(replica)
        return self._open.place_held(now_s)

    def on_replica_down(self, replica_id: str, now_s: float) -> list[Decision]:
        """Forget an engine and all bookings on it.

        Requests placed there stay open: only the shell knows how far each one
        got, and so reports each by `on_attempt_failed`. If it did not, they
        would stay open for ever.
        """
        if (lost := self._fleet.remove(replica_id)) is not None:
            self._health.lose(lost, now_s)
        return self._open.place_held(now_s)

    # Time and people

    def on_tick(self, now_s: float) -> list[Decision]:
        """Reject what has been held too long; leave the sick; place what can be."""
        decisions: list[Decision] = []
        if now_s >= self._health.next_check_s:
            decisions += self._health.check(self._fleet, now_s)
        decisions += self._open.place_held(now_s, at_once=True)
        return [*decisions, *self._hedges.look(now_s)]

    def next_wake_s(self) -> float | None:
        """When to call `on_tick`, whatever happens; None while no request is open."""
        wakes_s = [self._hedges.next_look_s()]
        if len(self._queue):
            wakes_s += [self._queue.next_expiry_s(), self._spill.next_look_s()]
        if len(self._fleet) and (len(self._queue) or len(self._placer)):
            wakes_s.append(self._health.next_check_s)
        return min((wake_s for wake_s in wakes_s if wake_s is not None), default=None)

    @property
    def wants_prefix(self) -> bool:
        """Whether requests should come with their `prefix_hashes`."""
        return self._placer.policy.wants_prefix

    def set_policy(self, name: str, now_s: float, ablate: Collection[str] = ()) -> list[Decision]:
        """Choose by another policy from now on, without the parts named in `ablate`.

        It may hold less than the former. Raises `ValueError` for a name that is
        not in `POLICIES` and for a part that does not exist.
        """
        policy = make_policy(name, self._rng, ablate)
        self._predictions.restart()
        self._use(policy)
        return self._open.place_held(now_s)

    def engine_priority_s(self, request: Request) -> float | None:
        """By what time the engine should order the request, too; None: as they arrive.

        On the clock of `request.arrival_s`. The order of the hold queue, carried
        on inside the engine, so that a short prompt also passes those that wait there.
        """
        if not self._placer.holds or self._queue.by_arrival:
            return None
        placement = self._placer.get(request.id)
        return edf_key_s(placement.request if placement is not None else request, self.settings)

    def state(self, now_s: float) -> RouterState:
        """Return everything worth knowing about the router now."""
        return RouterState(
            policy=self._placer.policy.name,
            ablate=self._placer.policy.ablated,
            holds=self._placer.holds,
            replicas={replica.id: replica.state(now_s) for replica in self._fleet},
            held=self._queue.state(),
            is_overloaded=self._overloads.is_overloaded_by_model(now_s),
            num_placed=len(self._placer),
            outcomes={outcome.value: self.outcomes[outcome] for outcome in Outcome},
            is_by_arrival=self._queue.by_arrival,
            accuracy=self._predictions.state(),
            fallback=self._spill.state(now_s),
            hedges=self._hedges.state(),
            retries=RetriesState(num_made=self.num_retries, budget=self._retries.state()),
            breaker_events=list(self._health.log),
        )

    def _use(self, policy: Policy) -> bool:
        """Choose by this policy, and hold and order as it wants; whether the order has changed.

        By arrival while predictions are bad, whatever it wants.
        """
        holds = policy.holds if self.settings.hold is None else self.settings.hold
        return self._placer.use(
            policy,
            holds=holds and "hold" not in policy.ablated,
            by_arrival="order" in policy.ablated or self._predictions.are_bad,
        )
