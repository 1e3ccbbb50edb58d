r"""The router: events and `now_s` in, decisions out.

A request's states, and who moves it:

    (new) --on_arrival--> held --room (any event)--> placed --on_finish--> COMPLETED
      |                     |  \                     |   \--on_attempt_failed--> as if new,
      |                     |   \--deadline--> EXPIRED           or FAILED
      |                     |\--on_cancel--> RENEGED <--on_cancel--/
      |                     \--engines late or gone--> at a provider (`router.fallback`)
      \--queue full, unknown model--> REJECTED

New requests are placed at once where possible. One that its engine does not
carry through is placed again, elsewhere if there is an elsewhere: a retry, or,
if its reply had begun, a resumption; only the shell knows which. Every request
ends in exactly one Outcome, and its booking with it. An id that ended, or never was, is not
known any more: events about it change nothing, so a shell may report an end
twice, or late. An id must not be used again while its request is open.

What never happens: a decision about a request that has ended; a dispatch to a
replica that is draining or lost, or past an open breaker; a new request held past
the queue's bounds.
"""

import math
import random
from collections import Counter
from collections.abc import Collection, Sequence
from typing import get_args

import msgspec

from router.breaker import Failure
from router.budget import RateReport
from router.fallback import FallbackSettings, Spill, own_budget
from router.fleet import Fleet
from router.health import Health
from router.hold import HoldQueue
from router.placement import Placement, Placer
from router.policies import POLICIES, Policy
from router.predictions import Predictions
from router.promise import promised_s
from router.provider import MakeBudget, ProviderSettings
from router.replica import Replica
from router.retry_budget import RetryBudget
from router.settings import Part, RouterSettings
from router.types import (
    BlockUpdate,
    Decision,
    EngineInfo,
    EngineSnapshot,
    Fail,
    Hold,
    Outcome,
    Reject,
    RejectReason,
    Request,
    Usage,
)

# Attempts at one request, after which the request itself is the likely cause of its failures.
_MAX_TRIED = 6


class Router:
    """Decides for every request which engine, when, and whether to wait.

    Pure and synchronous; not thread-safe. After each call the shell carries
    out the decisions in their order, and calls `on_tick` at `next_wake_s()`.
    Without `rng` it draws from a generator seeded by the settings.
    """

    def __init__(self, settings: RouterSettings, rng: random.Random | None = None) -> None:
        self.settings = settings
        self.outcomes: Counter[Outcome] = Counter()
        self.num_retries = 0  # resumptions included
        self._rng = rng if rng is not None else random.Random(settings.seed)
        self._fleet = Fleet()
        self._queue = HoldQueue(settings)
        self._health = Health(settings, self._rng)
        self._retries = RetryBudget(settings.retry, now_s=0.0)
        self._spill = Spill(self._fleet, self._queue, settings, self._rng)
        self._predictions = Predictions(settings.max_prediction_error)
        self._policy_name: str = settings.policy
        policy = self._make_policy(settings.policy)
        self._placer = Placer(
            self._fleet, self._queue, policy, holds=True, tpot_targets_s=settings.tpot_target_s
        )
        self._use(policy, settings.ablate)

    # Requests

    def on_arrival(self, request: Request, now_s: float) -> list[Decision]:
        """Place, hold or reject a new request; one whose id is open is ignored."""
        if request.id in self._placer or request.id in self._queue or request.id in self._spill:
            return []
        self._retries.deposit()
        if now_s < self._health.next_check_s:
            return self._admit(request, now_s)
        # Nobody looked while there was no work: an engine may have fallen silent meanwhile.
        return [*self._health.check(self._fleet, now_s), *self._admit(request, now_s)]

    def _admit(self, request: Request, now_s: float) -> list[Decision]:
        # While no engine is there at all, any of them may be the one that is starting.
        is_known = self._fleet.knows(request.model) or self._spill.serves(request.model)
        if len(self._fleet) and not is_known:
            return [self._reject(request, RejectReason.UNKNOWN_MODEL, None)]
        if "length" not in self._ablate:
            request = self._predictions.with_length(request)
        return self._enter(request, now_s)

    def on_first_token(self, request_id: str, now_s: float) -> list[Decision]:
        """Learn from a first token: compare it with what was predicted."""
        placement = self._placer.start(request_id, now_s)
        if placement is not None:
            ttft_s = max(0.0, now_s - placement.placed_s)
            self._predictions.on_first_token(placement, now_s)
            self._placer.policy.observe(placement.replica, ttft_s, now_s)
            if self.settings.breaker.is_slow(ttft_s, placement.predicted_ttft_s):
                self._judge_slow([placement], now_s)
            if self._reorder():
                return self._place_held(now_s)
        else:
            self._spill.start(request_id, now_s)
        return []

    def on_finish(self, request_id: str, usage: Usage | None, now_s: float) -> list[Decision]:
        """End a request that its engine, or provider, has answered: COMPLETED."""
        if self._spill.finish(request_id, usage, now_s):
            self.outcomes[Outcome.COMPLETED] += 1
            return self._place_held(now_s, at_once=True)
        placement = self._placer.start(request_id, now_s)
        if placement is not None:  # the whole response came at once
            latency_s = max(0.0, now_s - placement.placed_s)
            self._placer.policy.observe(placement.replica, latency_s, now_s)
        if (placement := self._placer.get(request_id)) is not None:
            placement.replica.breaker.succeed(placement.permit, now_s)
            if usage is not None:
                self._predictions.on_finish(placement, usage, now_s)
        return self._end(request_id, Outcome.COMPLETED, now_s, usage)

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

        Through no fault of the client's; past the last retry a provider may have it.
        `failure` is what the engine did to this
        request alone: it counts for the breaker, and the retry against the budget.
        None where the engine as a whole was lost or left: then its breaker keeps
        a storm off, and what the other engines get is no more than it had. The
        shell knows whether it `can_retry`, whether the reply `has_begun`, so that
        only an engine can go on with it, and how many tokens this engine has
        generated that another will have to prefill.

        The request keeps its first arrival, so it has not lost its turn.
        """
        placement = self._placer.get(request_id)
        if placement is None:
            return []
        request, replica = placement.request, placement.replica
        if failure is not None:
            replica.breaker.fail(placement.permit, failure, now_s)
        if not can_retry:
            return [Fail(request_id), *self._end(request_id, Outcome.FAILED, now_s)]
        no_engine = len(request.tried) + 1 >= self.settings.max_attempts or (
            failure is not None and not self._retries.try_withdraw(now_s)
        )
        replica.breaker.release(placement.permit)
        self._placer.release(request_id)
        self._queue.settle(request, Usage())  # it is charged anew where it goes next
        again = msgspec.structs.replace(
            request,
            num_prompt_tokens=request.num_prompt_tokens + num_output_tokens,
            tried=(*request.tried, replica.id),
            retried_s=now_s,
            has_begun=has_begun,
        )
        decision: Decision | None = None
        if no_engine and (decision := self._spill.send_now(again, now_s)) is None:
            self.outcomes[Outcome.FAILED] += 1
            return [Fail(request_id), *self._place_held(now_s)]
        self.num_retries += 1
        if decision is None:
            return self._enter(again, now_s)
        return [decision, *self._place_held(now_s)]

    def on_cancel(self, request_id: str, now_s: float) -> list[Decision]:
        """End a request whose client has left, held or placed: RENEGED."""
        was_away = self._spill.cancel(request_id, now_s)
        if not was_away and self._queue.remove(request_id) is None:
            return self._end(request_id, Outcome.RENEGED, now_s)
        self.outcomes[Outcome.RENEGED] += 1
        return self._place_held(now_s)

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
        return self._place_held(now_s, at_once=True)

    def on_provider_answer(
        self, request_id: str, report: RateReport, now_s: float
    ) -> list[Decision]:
        """Take in that a provider has begun to answer, and what it says of its limits."""
        self._spill.count(request_id, report, now_s)
        return []

    def on_provider_refused(
        self, request_id: str, report: RateReport, now_s: float
    ) -> list[Decision]:
        """Place a request again that a provider refused for its rate: 429."""
        request = self._spill.refuse(request_id, report, now_s)
        return [] if request is None else self._enter(request, now_s)

    def on_provider_failed(
        self,
        request_id: str,
        failure: Failure,
        now_s: float,
        *,
        can_retry: bool = True,
        was_sent: bool = True,
        lasts: bool = False,
    ) -> list[Decision]:
        """Place a request again that a provider did not carry through, or give it up.

        `can_retry` while nothing of the answer has been passed on; `was_sent`
        unless the provider never saw the request; `lasts` if whatever is sent
        under this key would fail in the same way.
        """
        request = self._spill.fail(request_id, failure, was_sent=was_sent, lasts=lasts, now_s=now_s)
        if request is None:
            return []
        if can_retry and len(request.tried) < _MAX_TRIED:
            return self._enter(request, now_s)
        self.outcomes[Outcome.FAILED] += 1
        return [Fail(request_id), *self._place_held(now_s, at_once=True)]

    # Replicas

    def on_replica_up(self, replica_id: str, info: EngineInfo, now_s: float) -> list[Decision]:
        """Take in an engine to which there is a connection now.

        A known id means a new connection: the old one, and all that was booked
        on it, is lost.
        """
        self._lose(replica_id, now_s)
        breaker = self._health.breaker(replica_id, info, self._fleet, now_s)
        self._fleet.add(Replica(replica_id, info, now_s, breaker))
        return self._place_held(now_s)

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
        if was_slow:
            self._judge_slow(self._placer.on(replica), now_s)
        return self._place_held(now_s)

    def on_blocks(self, replica_id: str, update: BlockUpdate) -> bool:
        """Take in what an engine's prefix cache holds; False if an update was missed.

        Then nothing is taken to be cached there until the shell has got one
        that tells all of it.
        """
        replica = self._fleet.get(replica_id)
        return replica is None or replica.receive_blocks(update)

    def on_replica_draining(self, replica_id: str, now_s: float) -> list[Decision]:
        """Send an engine no new work; what it has may finish."""
        replica = self._fleet.get(replica_id)
        if replica is not None:
            replica.is_draining = True
            self._fleet.refresh(replica)
        return self._place_held(now_s)

    def on_replica_down(self, replica_id: str, now_s: float) -> list[Decision]:
        """Forget an engine and all bookings on it.

        Requests placed there stay open: only the shell knows how far each one
        got, and so reports each by `on_attempt_failed`. If it did not, they
        would stay open for ever.
        """
        self._lose(replica_id, now_s)
        return self._place_held(now_s)

    # Time and people

    def on_tick(self, now_s: float) -> list[Decision]:
        """Reject what has been held too long; leave the sick; place what can be."""
        decisions: list[Decision] = []
        if now_s >= self._health.next_check_s:
            decisions += self._health.check(self._fleet, now_s)
        return [*decisions, *self._place_held(now_s, at_once=True)]

    def next_wake_s(self) -> float | None:
        """When to call `on_tick`, whatever happens; None while no request is open."""
        wakes_s = []
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
        policy = self._make_policy(name)
        self._use(policy, ablate)
        self._policy_name = name
        self._predictions.restart()
        return self._place_held(now_s)

    def engine_priority_s(self, request: Request) -> float | None:
        """By what time the engine should order the request, too; None: as they arrive.

        On the clock of `request.arrival_s`. The order of the hold queue, carried
        on inside the engine, so that a short prompt also passes those that wait there.
        """
        if not self._placer.holds or self._queue.by_arrival:
            return None
        return promised_s(request, self.settings)

    def state(self, now_s: float) -> dict[str, object]:
        """Everything worth knowing about the router now; JSON-able."""
        return {
            "policy": self._policy_name,
            "ablate": self._ablate,
            "holds": self._placer.holds,
            "replicas": {replica.id: replica.state(now_s) for replica in self._fleet},
            "held": {
                "num_requests": len(self._queue),
                "num_tokens": self._queue.num_tokens,
                "num_bytes": self._queue.num_bytes,
                "num_tokens_by_model": dict(self._queue.num_tokens_by_model),
            },
            "num_placed": len(self._placer),
            "outcomes": {outcome.value: self.outcomes[outcome] for outcome in Outcome},
            "is_by_arrival": self._queue.by_arrival,
            "accuracy": self._predictions.state(),
            "fallback": self._spill.state(now_s),
            "retries": {"num_made": self.num_retries, "budget": self._retries.state()},
            "breaker_events": self._health.state(),
        }

    # Steps that several events share

    def _enter(self, request: Request, now_s: float) -> list[Decision]:
        """Place, hold or reject a request that is neither placed nor held."""
        # Passes nobody: who waits could not go now either, or would have gone with the event
        # that made room, and what is kept for them this request does not get.
        dispatch = self._placer.place(request, now_s)
        if dispatch is not None:
            return [dispatch]
        decisions = self._expire(now_s)
        expires_s = self._queue.expires_s(request)
        if expires_s <= now_s:
            decisions.append(self._reject(request, RejectReason.EXPIRED, None))
        elif self._is_hopeless(request, now_s):
            decisions.append(self._give_up(request, now_s))
        elif (late_s := self._turn_s(request, now_s) - expires_s) > 0.0:
            # Held, it would only take room until it expired. Once what is too much has
            # drained, one like it would be in time.
            decisions.append(self._turn_away(request, RejectReason.HOPELESS, late_s, now_s))
        elif not self._queue.push(request):
            drain_s = self._drain_s(request.model)
            decisions.append(self._turn_away(request, RejectReason.QUEUE_FULL, drain_s, now_s))
        # A request that is not the next one changes nothing for the others.
        if decisions or self._spill.providers or self._queue.is_head(request):
            at_once = not self._fleet.working(request.model)
            decisions += self._give_out(now_s, at_once=at_once)
        if request.id in self._queue:
            decisions.append(Hold(request.id))
        return decisions

    def _turn_away(
        self, request: Request, reason: RejectReason, retry_after_s: float | None, now_s: float
    ) -> Decision:
        """What becomes of a request that cannot be held."""
        if self._spill.settings.spill != "unavailable" or not self._fleet.working(request.model):
            fallback = self._spill.send_now(request, now_s)
            if fallback is not None:
                return fallback
        return self._reject(request, reason, retry_after_s)

    def _is_hopeless(self, request: Request, now_s: float) -> bool:
        """Whether only providers serve the model, and no budget has room in time."""
        if self._fleet.knows(request.model) or not self._spill.serves(request.model):
            return False
        return now_s + self._spill.wait_s(request, now_s) >= self._queue.expires_s(request)

    def _give_up(self, request: Request, now_s: float) -> Decision:
        """End a request that is hopeless."""
        if request.tried:
            self.outcomes[Outcome.FAILED] += 1
            return Fail(request.id)
        wait_s = self._spill.wait_s(request, now_s)
        retry_after_s = None if math.isinf(wait_s) else wait_s
        return self._reject(request, RejectReason.NO_BUDGET, retry_after_s)

    def _end(
        self, request_id: str, outcome: Outcome, now_s: float, usage: Usage | None = None
    ) -> list[Decision]:
        """End a placed request; its room may let others go."""
        placement = self._placer.get(request_id)
        if placement is None:
            return []
        placement.replica.breaker.release(placement.permit)  # if it had no verdict yet
        self._placer.release(request_id)
        if usage is not None:
            self._queue.settle(placement.request, usage)
        self.outcomes[outcome] += 1
        return self._place_held(now_s)

    def _lose(self, replica_id: str, now_s: float) -> None:
        """Forget an engine; an unknown id changes nothing."""
        if (replica := self._fleet.get(replica_id)) is not None:
            self._fleet.remove(replica_id)
            self._health.lose(replica, now_s)

    def _judge_slow(self, placements: list[Placement], now_s: float) -> None:
        """Count calls to one engine as slow, unless most engines of the model are out already."""
        if placements and self._health.may_judge_slow(placements[0].replica, self._fleet):
            for placement in placements:
                placement.replica.breaker.slow(placement.permit, now_s)
            self._fleet.refresh(placements[0].replica)

    def _place_held(self, now_s: float, *, at_once: bool = False) -> list[Decision]:
        """Reject what has been held too long, place what can be."""
        return [*self._expire(now_s), *self._give_out(now_s, at_once=at_once)]

    def _give_out(self, now_s: float, *, at_once: bool) -> list[Decision]:
        """Place what engines have room for; send to providers what should not wait for them."""
        dispatches = self._placer.place_held(now_s)
        if not self._spill.providers:
            return list(dispatches)
        num_tokens: Counter[str] = Counter()
        for dispatch in dispatches:
            if (placement := self._placer.get(dispatch.request_id)) is not None:
                num_tokens[placement.request.model] += placement.request.num_prompt_tokens
        self._spill.took(num_tokens, now_s)
        return [*dispatches, *self._spill.send_held(now_s, at_once=at_once)]

    def _expire(self, now_s: float) -> list[Decision]:
        return [
            self._reject(request, RejectReason.EXPIRED, None)
            for request in self._queue.expire(now_s)
        ]

    def _reject(
        self, request: Request, reason: RejectReason, retry_after_s: float | None
    ) -> Reject:
        """The decision, counted."""
        expired = reason is RejectReason.EXPIRED
        self.outcomes[Outcome.EXPIRED if expired else Outcome.REJECTED] += 1
        return Reject(request.id, reason, retry_after_s)

    def _turn_s(self, request: Request, now_s: float) -> float:
        """When what is held before a request will have been prefilled, as predicted.

        `now_s` where nothing is known of engines that could do it.
        """
        num_tokens = self._queue.num_tokens_by_model.get(request.model, 0)
        drain_s = self._fleet.drain_s(request.model, num_tokens)
        if drain_s is None:
            return now_s
        if now_s + drain_s > self._queue.expires_s(request):  # look closer: some come after it
            num_tokens = self._queue.num_tokens_before(request)
            drain_s = self._fleet.drain_s(request.model, num_tokens)
        return now_s + (drain_s or 0.0)

    def _reorder(self) -> bool:
        """Whether the order has changed: by arrival while predictions are bad."""
        by_arrival = "order" in self._ablate or self._predictions.are_bad
        if by_arrival == self._queue.by_arrival:
            return False
        self._placer.use(self._placer.policy, holds=self._placer.holds, by_arrival=by_arrival)
        return True

    def _drain_s(self, model: str) -> float | None:
        """Predicted seconds until the queue is empty; None if no engine empties it.

        Models drain side by side, so the slowest counts. By prefill rates
        alone: true while prefill is what engines are short of.
        """
        held = {model: 0} | self._queue.num_tokens_by_model
        drains_s = [self._fleet.drain_s(name, num_tokens) for name, num_tokens in held.items()]
        return max((drain_s for drain_s in drains_s if drain_s is not None), default=None)

    def _make_policy(self, name: str) -> Policy:
        if name not in POLICIES:
            raise ValueError(f"unknown policy {name!r}: one of {', '.join(POLICIES)}")
        return POLICIES[name](self._rng)

    def _use(self, policy: Policy, ablate: Collection[str]) -> None:
        """Choose, hold and order by this policy without these parts."""
        parts = get_args(Part)
        if unknown := set(ablate).difference(parts):
            raise ValueError(f"unknown part {min(unknown)!r} to ablate: one of {', '.join(parts)}")
        self._ablate = sorted(set(ablate))
        policy.ablate(ablate)
        holds = policy.holds if self.settings.hold is None else self.settings.hold
        self._placer.use(policy, holds=holds and "hold" not in ablate, by_arrival="order" in ablate)
