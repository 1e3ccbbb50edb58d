"""A shell with engines that do as they please.

It knows from the router's decisions alone where every request is, and compares. What happens
to it is in `test_invariants.py`.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import msgspec
from hypothesis.stateful import RuleBasedStateMachine

from router.core.carry_out import carry_out
from router.core.router import Router
from router.core.settings import RouterSettings
from router.resilience.breaker import BreakerState, Failure
from router.types import (
    Decision,
    Dispatch,
    EngineSnapshot,
    Evacuate,
    Fail,
    Fallback,
    Hold,
    Outcome,
    Reject,
    RejectReason,
    Request,
    Withdraw,
)
from tests.support.builders import snapshot

MAX_REQUESTS, MAX_TOKENS, MAX_BYTES, MAX_HOLD_S = 3, 3500, 299, 10.0
MAX_ATTEMPTS = 3
NAMES = {"r0": ("m",), "r1": ("m", "lora"), "r2": ("n",)}  # what each engine serves
TURN_TOKENS, BLOCK_TOKENS, MAX_TURNS = 32, 16, 4  # a turn is one text block and two KV blocks


@dataclass
class Engine:
    """One connection to an engine."""

    replica_id: str
    calls: set[str] = field(default_factory=set)  # open; of former connections, too
    accepts_work: bool = True
    last_booking: int = 0
    bookings: dict[str, int] = field(default_factory=dict)  # open, by request
    report: EngineSnapshot = field(default_factory=lambda: snapshot(-1))  # none yet
    cached: Counter[int] = field(default_factory=Counter)  # leading KV blocks, by conversation
    position: int = 0  # changes to them
    told: Counter[int] = field(default_factory=Counter)  # of these, what the router has to count
    told_position: int = 0
    coming: dict[str, tuple[int, int]] = field(default_factory=dict)  # conversation and turns

    @property
    def is_idle(self) -> bool:
        """Whether nothing is known to be in it or on its way to it."""
        on_the_way = any(n > self.report.last_booking for n in self.bookings.values())
        report = self.report
        in_it = report.num_running_reqs + report.num_waiting_reqs
        return not (on_the_way or in_it or report.num_pending_prefill_tokens)


def kv_blocks(talk: int, first: int, end: int) -> list[int]:
    """Hashes of these KV blocks of a conversation, none if `end` is before `first`."""
    return [1000 * talk + number for number in range(first, end)]


class Shell(RuleBasedStateMachine):
    """Carries out what the router decides, and checks that it may."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.num_arrived = 0
        self.engines: dict[str, Engine] = {}
        self.lost: dict[str, set[str]] = {}  # engines whose breakers are kept, and their calls
        self.probes: dict[str, str] = {}  # by engine that is half-open
        self.held: dict[str, Request] = {}
        self.placed: dict[str, tuple[Request, Engine]] = {}
        self.retried_s: dict[str, float] = {}  # when the last attempt failed
        self.num_attempts: Counter[str] = Counter()  # that failed
        self.num_stuck: Counter[str] = Counter()  # of these, since the reply last got further
        self.ended: Counter[Outcome] = Counter()
        self.num_turns_known: Counter[int] = Counter()  # of which the router knows the KV blocks
        self.entering: Request | None = None  # about which the router is to decide
        self.limits: dict[str, int] = {}  # of the predicted answer, by request
        self.num_booked_tokens: dict[str, int] = {}  # to prefill, by request placed last
        self.policy, self.ablate = "", frozenset()

    def make_router(self, policy: str, **options: Any) -> None:
        """Begin with a router of this policy that has no engines yet."""
        self.policy = policy
        self.router = Router(
            RouterSettings(
                policy=policy,
                max_held_requests=MAX_REQUESTS,
                max_held_tokens=MAX_TOKENS,
                max_held_bytes=MAX_BYTES,
                max_hold_s=MAX_HOLD_S,
                max_attempts=MAX_ATTEMPTS,
                suspect_hold_s=0.0,  # suspects are held as long as others
                breaker={"max_consecutive_failures": 2, "cooldown_jitter": 0.0},
                **options,
            )
        )

    def pick(self, number: int) -> str:
        """One of the open requests, or, for 0, the first ever, as a rule long ended."""
        open_ids = [*self.held, *self.placed]
        return open_ids[number % len(open_ids)] if number and open_ids else "q0"

    def lose(self, replica_id: str) -> None:
        engine = self.engines.pop(replica_id, None)
        if engine is not None and engine.accepts_work:  # not of one that left in peace
            self.lost[replica_id] = engine.calls

    # What the decisions mean

    def follow(self, decisions: list[Decision], entering: Request | None = None) -> None:
        """Carry out the decisions; `entering` is the request they were asked for, if any."""
        outer, self.entering = self.entering, entering
        carry_out(decisions, self)
        assert self.entering is None, "no decision about the request"
        self.entering = outer

    def waiting(self, request_id: str) -> tuple[Request, bool]:
        """The request that a decision is about, and whether it was held."""
        if (request := self.held.get(request_id)) is not None:
            return request, True
        assert self.entering is not None, f"a decision about {request_id}, which is not waiting"
        assert request_id == self.entering.id
        request, self.entering = self.entering, None
        return request, False

    def dispatch(self, decision: Dispatch) -> None:
        request, was_held = self.waiting(decision.request_id)
        self.send(request, decision, was_held)

    def hold(self, decision: Hold) -> None:
        request, was_held = self.waiting(decision.request_id)
        assert not was_held
        self.held[request.id] = request

    def reject(self, decision: Reject) -> None:
        request, was_held = self.waiting(decision.request_id)
        self.turn_away(request, decision, self.entering if was_held else None)

    def fail(self, decision: Fail) -> None:
        request, was_held = self.waiting(decision.request_id)
        assert not was_held
        assert self.num_attempts[request.id]
        self.ended[Outcome.FAILED] += 1

    def withdraw(self, decision: Withdraw) -> None:
        raise AssertionError(f"{decision} without hedging")

    def fall_back(self, decision: Fallback) -> None:
        raise AssertionError(f"{decision} without providers")

    def send(self, request: Request, dispatch: Dispatch, was_held: bool) -> None:
        if was_held:
            assert self.expires_s(request) > self.now_s
        self.held.pop(request.id, None)
        engine = self.engines[dispatch.replica_id]
        assert engine.accepts_work
        breaker = self.breakers()[dispatch.replica_id]
        assert breaker.state is not BreakerState.OPEN
        if breaker.state is BreakerState.HALF_OPEN:
            assert self.probes.get(dispatch.replica_id) not in engine.calls
            self.probes[dispatch.replica_id] = request.id
        engine.calls.add(request.id)
        assert request.model in NAMES[dispatch.replica_id]
        assert dispatch.booking == engine.last_booking + 1
        assert dispatch.num_cached_tokens == self.num_cached_tokens(request, engine)
        placed = self.router._attempts.oldest(request.id).request
        assert 1 <= placed.num_expected_output_tokens <= self.limits[request.id]
        engine.last_booking += 1
        engine.bookings[request.id] = dispatch.booking
        if request.prefix_hashes and self.wants_blocks:
            talk = request.prefix_hashes[-1] // 100
            engine.coming[request.id] = (talk, len(request.prefix_hashes))
        num_new_tokens = request.num_prompt_tokens - dispatch.num_cached_tokens
        self.num_booked_tokens[request.id] = max(1, num_new_tokens)
        self.placed[request.id] = (request, engine)

    def turn_away(self, request: Request, reject: Reject, entering: Request | None) -> None:
        """`entering` is for whom a request that was held had to leave, if it had to."""
        if request.id in self.held and reject.reason is not RejectReason.EXPIRED:
            assert reject.reason is RejectReason.QUEUE_FULL
            self.assert_took_most(request, entering)
        self.held.pop(request.id, None)
        if reject.reason is RejectReason.EXPIRED:
            assert self.expires_s(request) <= self.now_s
            self.ended[Outcome.EXPIRED] += 1
        else:
            is_poison = reject.reason is RejectReason.ENDS_ENGINES
            assert self.num_attempts[request.id] >= 2 if is_poison else True
            assert is_poison or not self.num_attempts[request.id]
            self.ended[Outcome.REJECTED] += 1
            if reject.reason in (RejectReason.HOPELESS, RejectReason.OVERLOADED):
                assert self.expires_s(request) > self.now_s
                assert 0.0 < reject.retry_after_s < float("inf")
                serving = [e for i, e in self.engines.items() if request.model in NAMES[i]]
                assert any(e.accepts_work for e in serving)

    def assert_took_most(self, leaving: Request, entering: Request) -> None:
        """Only of the tenant that takes most of the queue, for another that takes less."""

        def sizes(tenant: str, *more: Request) -> list[float]:
            requests = [r for r in self.held.values() if r.tenant == tenant] + list(more)
            weight = requests[0].weight if requests else 1.0
            return [
                len(requests) / weight,
                sum(r.num_prompt_tokens for r in requests) / weight,
                sum(r.num_bytes for r in requests) / weight,
            ]

        assert leaving.tenant != entering.tenant
        others = {r.tenant for r in self.held.values()} - {entering.tenant}
        assert any(
            theirs > ours and theirs == most
            for theirs, ours, most in zip(
                sizes(leaving.tenant),
                sizes(entering.tenant, entering),
                map(max, zip(*map(sizes, others), strict=True)),
                strict=True,
            )
        )

    def num_cached_tokens(self, request: Request, engine: Engine) -> int:
        """What the router has to take to be cached of the prompt, and no more."""
        if not request.prefix_hashes:
            return 0
        talk, num_turns = request.prefix_hashes[-1] // 100, len(request.prefix_hashes)
        coming = [turns for each, turns in engine.coming.values() if each == talk]
        num_tokens = min(num_turns, max(coming, default=0)) * TURN_TOKENS
        if self.wants_blocks:
            num_known = min(num_turns, self.num_turns_known[talk]) * TURN_TOKENS // BLOCK_TOKENS
            num_tokens = max(num_tokens, min(num_known, engine.told[talk]) * BLOCK_TOKENS)
        return min(num_tokens, max(0, request.num_prompt_tokens - 1))

    @property
    def wants_blocks(self) -> bool:
        without = self.policy == "headway" and "prefix" in self.ablate
        return self.policy in ("headway", "lmetric") and not without

    def breakers(self) -> dict[str, dict]:
        replicas = self.router.state(self.now_s).replicas
        return {replica_id: replica.breaker for replica_id, replica in replicas.items()}

    def quarantined(self) -> set[str]:
        """Engines that a suspect has, or will have, to itself."""
        replicas = self.router.state(self.now_s).replicas
        return {replica_id for replica_id, replica in replicas.items() if replica.is_quarantined}

    def waiting_for(self, replica_id: str) -> list[str]:
        """Held requests that this engine serves, but for suspects, which it may be too good for."""
        return [
            request.id
            for request in self.held.values()
            if request.model in NAMES[replica_id]
            and not self.router._queue.get(request.id).is_suspect
        ]

    def evacuate(self, decision: Evacuate) -> None:
        """Only from engines with an open breaker, and only while there is work on them."""
        replica_id = decision.replica_id
        assert self.breakers()[replica_id].state is BreakerState.OPEN
        engine = self.engines[replica_id]
        assert engine.bookings
        for request_id in list(engine.bookings):
            self.fail_attempt(request_id, None)

    def fail_attempt(self, request_id: str, failure: Failure | None, **options: Any) -> None:
        _, engine = self.placed.get(request_id, (None, None))
        replica_id = "r0" if engine is None else engine.replica_id
        request = self.take_back(request_id)
        if request is not None:
            num_tokens = request.num_prompt_tokens + options.get("num_output_tokens", 0)
            request = msgspec.structs.replace(request, num_prompt_tokens=num_tokens)
            self.num_attempts[request_id] += 1
            has_got_on = options.get("num_output_tokens", 0) > 0
            self.num_stuck[request_id] = 1 if has_got_on else self.num_stuck[request_id] + 1
            self.retried_s[request_id] = self.now_s
        decisions = self.router.failures.on_attempt_failed(
            request_id, replica_id, failure, self.now_s, **options
        )
        if request is not None:
            # There is budget enough in these sequences: it is the attempts that run out.
            may_retry = options.get("can_retry", True)
            # Who loses whole engines is for `suspects` to say; here no body comes twice.
            is_last = failure is not None and self.num_stuck[request_id] >= MAX_ATTEMPTS
            is_last = is_last or self.num_attempts[request_id] == 3 * MAX_ATTEMPTS
            assert (Fail(request_id) in decisions) == (is_last or not may_retry)
        self.follow(decisions, entering=request)

    def expires_s(self, request: Request) -> float:
        if request.id in self.retried_s:
            return self.retried_s[request.id] + MAX_HOLD_S
        return min(request.deadline_s, request.arrival_s + MAX_HOLD_S)

    def take_back(self, request_id: str) -> Request | None:
        """The request, no longer placed."""
        request, engine = self.placed.pop(request_id, (None, None))
        if engine is not None:
            del engine.bookings[request_id]
            engine.calls.remove(request_id)
            engine.coming.pop(request_id, None)
        return request
