"""Generated event sequences: whatever happens, in whatever order, this holds.

The machine below is a shell with engines that do as they please. It knows from
the decisions alone where every request is, and compares. Hypothesis prints the
shortest failing sequence as a program, and what brings it back (`tests/conftest.py`
says how to look through more of them).
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from router.core.carry_out import carry_out
from router.core.router import Router
from router.resilience.breaker import BreakerState, Failure
from router.scheduling.ablation import PARTS
from router.scheduling.policies import POLICIES
from router.settings import RouterSettings
from router.types import (
    BlockUpdate,
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
    RequestClass,
    Usage,
    Withdraw,
)
from tests.support.builders import after_json, info, req, snapshot

MAX_REQUESTS, MAX_TOKENS, MAX_BYTES, MAX_HOLD_S = 3, 3500, 299, 10.0
MAX_ATTEMPTS = 3
NAMES = {"r0": ("m",), "r1": ("m", "lora"), "r2": ("n",)}  # what each engine serves
SIZES = st.sampled_from([0, 1, 30, 120, 900, 3000])
ENGINES = st.sampled_from(sorted(NAMES))
ANY_REQUEST = st.integers(0, 9)  # see `Shell.pick`
TALKS = st.sampled_from([1, 2])  # conversations
TURN_TOKENS, BLOCK_TOKENS, MAX_TURNS = 32, 16, 4  # a turn is one text block and two KV blocks
MAX_OUTPUT_TOKENS = 400  # of any answer, so no prediction may pass it
MAX_NUM_SEQS = 8  # of each engine


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

    @initialize(
        policy=st.sampled_from(sorted(POLICIES)),
        hold=st.sampled_from([None, True, False]),
        tpot_target_s=st.sampled_from([{}, {"m": 1e-9}, {"m": 0.0205, "*": 10.0}]),
        max_late_s=st.sampled_from([None, 0.01, 1.0]),
    )
    def start(self, policy, hold, tpot_target_s, max_late_s):
        self.policy = policy
        self.router = Router(
            RouterSettings(
                policy=policy,
                hold=hold,
                max_held_requests=MAX_REQUESTS,
                max_held_tokens=MAX_TOKENS,
                max_held_bytes=MAX_BYTES,
                max_hold_s=MAX_HOLD_S,
                max_attempts=MAX_ATTEMPTS,
                max_late_s=max_late_s,
                breaker={"max_consecutive_failures": 2, "cooldown_jitter": 0.0},
                tpot_target_s=tpot_target_s,
            )
        )
        for replica_id in NAMES:
            self.up(replica_id)

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
            assert not self.num_attempts[request.id]
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
        return self.policy == "headway" and "prefix" not in self.ablate

    def pick(self, number: int) -> str:
        """One of the open requests, or, for 0, the first ever, as a rule long ended."""
        open_ids = [*self.held, *self.placed]
        return open_ids[number % len(open_ids)] if number and open_ids else "q0"

    def breakers(self) -> dict[str, dict]:
        replicas = self.router.state(self.now_s).replicas
        return {replica_id: replica.breaker for replica_id, replica in replicas.items()}

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
        decisions = self.router.on_attempt_failed(
            request_id, replica_id, failure, self.now_s, **options
        )
        if request is not None:
            # There is budget enough in these sequences: it is the attempts that run out.
            may_retry = options.get("can_retry", True)
            is_last = self.num_stuck[request_id] == MAX_ATTEMPTS
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

    # Requests

    @rule(
        model=st.sampled_from(["m", "m", "m", "lora", "n", "ghost"]),
        num_tokens=SIZES,
        num_sequences=st.integers(1, 3),
        num_bytes=st.sampled_from([0, 150]),
        patience_s=st.sampled_from([0.02, 0.5, 5.0, float("inf")]),
        max_output_tokens=st.sampled_from([None, 1, 50]),
        tenant=st.sampled_from(["", "a", "b"]),
        priority_class=st.sampled_from(RequestClass),
    )
    def arrive(self, model, num_tokens, patience_s, max_output_tokens, tenant="", **fields):
        request = req(
            f"q{self.num_arrived}",
            num_tokens,
            model=model,
            arrival_s=self.now_s,
            deadline_s=self.now_s + patience_s,
            max_output_tokens=max_output_tokens,
            tenant=tenant,
            weight=3.0 if tenant == "a" else 1.0,
            **fields,
        )
        self.num_arrived += 1
        is_limited = max_output_tokens is not None and "length" not in self.ablate
        self.limits[request.id] = max_output_tokens if is_limited else MAX_OUTPUT_TOKENS
        self.follow(self.router.on_arrival(request, self.now_s), entering=request)

    @rule(talk=TALKS, num_turns=st.sampled_from([1, 2, MAX_TURNS]))
    def arrive_with_prefix(self, talk, num_turns):
        """A turn of a conversation: its text is that of the turns before, and more."""
        self.arrive(
            model="m",
            num_tokens=TURN_TOKENS * num_turns,
            patience_s=float("inf"),
            max_output_tokens=None,
            prefix_hashes=tuple(100 * talk + turn for turn in range(num_turns)),
            prefix_block_share=1.0 / num_turns,
        )

    @rule(number=ANY_REQUEST)
    def arrive_again(self, number):
        request_id = self.pick(number)
        if request_id in self.held or request_id in self.placed:
            assert self.router.on_arrival(req(request_id), self.now_s) == []

    @rule(
        number=ANY_REQUEST,
        end=st.sampled_from(["finish", "cancel"]),
        usage=st.none()
        | st.builds(Usage, num_output_tokens=st.sampled_from([0, 1, 20, MAX_OUTPUT_TOKENS])),
    )
    def end(self, number, end, usage):
        """Any id: placed, held, ended or never seen."""
        request_id = self.pick(number)
        was_placed = self.take_back(request_id) is not None
        if end == "finish":
            self.ended[Outcome.COMPLETED] += was_placed
            decisions = self.router.on_finish(request_id, usage, self.now_s)
        else:
            was_held = self.held.pop(request_id, None) is not None
            self.ended[Outcome.RENEGED] += was_placed or was_held
            decisions = self.router.on_cancel(request_id, self.now_s)
        self.follow(decisions)

    @rule(
        number=ANY_REQUEST,
        failure=st.sampled_from([None, Failure.ERROR, Failure.TIMEOUT]),
        can_retry=st.booleans(),
        num_output_tokens=st.sampled_from([0, 0, 7, 100]),
    )
    def attempt_fails(self, number, failure, can_retry, num_output_tokens):
        self.fail_attempt(
            self.pick(number),
            failure,
            can_retry=can_retry,
            has_begun=num_output_tokens > 0,
            num_output_tokens=num_output_tokens,
        )

    @rule(number=ANY_REQUEST)
    def first_token(self, number):
        assert self.router.on_first_token(self.pick(number), self.now_s) == []

    @rule(number=ANY_REQUEST)
    def tokenise(self, number):
        """Its engine tells what the prompt consists of, if it has any."""
        request_id = self.pick(number)
        request, engine = self.placed.get(request_id, (None, None))
        if request is None or not request.prefix_hashes:
            self.router.on_prompt(request_id, "r0", 100, [1, 2, 3])
            return
        talk, num_turns = request.prefix_hashes[-1] // 100, len(request.prefix_hashes)
        blocks = kv_blocks(talk, 0, num_turns * TURN_TOKENS // BLOCK_TOKENS)
        self.router.on_prompt(request_id, engine.replica_id, request.num_prompt_tokens, blocks)
        if engine.coming.pop(request_id, None) is not None:  # else nobody wants to know it
            self.num_turns_known[talk] = max(self.num_turns_known[talk], num_turns)

    # Engines

    @rule(replica_id=ENGINES)
    def up(self, replica_id):
        """Also while it is up: a new connection, whose old requests fail one by one later."""
        model, *aliases = NAMES[replica_id]
        self.lose(replica_id)
        self.engines[replica_id] = Engine(replica_id, calls=self.lost.pop(replica_id, set()))
        engine = info(
            model=model,
            aliases=tuple(aliases),
            max_num_seqs=MAX_NUM_SEQS,
            num_kv_tokens=2000,
            heartbeat_s=0.5,
        )
        self.follow(self.router.on_replica_up(replica_id, engine, self.now_s))

    @rule(replica_id=ENGINES)
    def drain(self, replica_id):
        if replica_id in self.engines:
            self.engines[replica_id].accepts_work = False
        self.follow(self.router.on_replica_draining(replica_id, self.now_s))

    @rule(replica_id=ENGINES)
    def down(self, replica_id):
        self.lose(replica_id)
        self.follow(self.router.on_replica_down(replica_id, self.now_s))

    def lose(self, replica_id: str) -> None:
        engine = self.engines.pop(replica_id, None)
        if engine is not None and engine.accepts_work:  # not of one that left in peace
            self.lost[replica_id] = engine.calls

    @rule(
        replica_id=ENGINES,
        step=st.sampled_from([1, 1, 1, 5, 0, -1]),
        num_pending_prefill_tokens=SIZES,
        num_running_reqs=st.integers(0, 9),
        num_inflight_reqs=st.integers(0, 1),
        num_steps_total=st.integers(0, 3),
        step_s=st.sampled_from([0.0, 0.1, 9.0]),
        num_free_kv_tokens=st.sampled_from([0, 200, 1100, 2000]),
        acknowledges=st.sampled_from([0, 1, 99]),
    )
    def report(self, replica_id, step, acknowledges, num_running_reqs, **fields):
        """In order, with a gap, repeated or late; from an engine that may be unknown."""
        engine = self.engines.get(replica_id, Engine())
        acknowledged = min(engine.last_booking, engine.report.last_booking + acknowledges)
        report = snapshot(
            engine.report.seq + step,
            last_booking=acknowledged,
            num_running_reqs=num_running_reqs,
            num_decoding_reqs=num_running_reqs,
            **fields,
        )
        if step > 0:
            engine.report = report
        self.follow(self.router.on_snapshot(replica_id, report, self.now_s))

    @rule(
        replica_id=ENGINES,
        talk=TALKS,
        num_blocks=st.integers(0, MAX_TURNS * TURN_TOKENS // BLOCK_TOKENS),
        telling=st.sampled_from(["news", "news", "all", "lost"]),
    )
    def cache(self, replica_id, talk, num_blocks, telling):
        """Its cache takes in or drops blocks, and it tells; or that never arrives."""
        engine = self.engines.get(replica_id, Engine())
        num_before, engine.cached[talk] = engine.cached[talk], num_blocks
        since, engine.position = engine.position, engine.position + abs(num_blocks - num_before)
        if telling == "lost":
            return
        if telling == "all":
            cached = [b for each, num in engine.cached.items() for b in kv_blocks(each, 0, num)]
            update = BlockUpdate(since=-1, until=engine.position, stored=cached)
        else:
            stored = kv_blocks(talk, num_before, num_blocks)
            removed = kv_blocks(talk, num_blocks, num_before)
            update = BlockUpdate(since=since, until=engine.position, stored=stored, removed=removed)
        is_whole = telling == "all" or since == engine.told_position
        if is_whole:
            engine.told, engine.told_position = Counter(engine.cached), engine.position
        else:
            engine.told = Counter()
        is_known = replica_id in self.engines
        assert self.router.on_blocks(replica_id, update) is (is_whole or not is_known)

    @rule(replica_id=ENGINES)
    def become_idle(self, replica_id):
        self.report(
            replica_id,
            step=1,
            acknowledges=99,
            num_running_reqs=0,
            num_free_kv_tokens=1984,
            num_pending_prefill_tokens=0,
        )

    # Time and people

    @rule(seconds=st.sampled_from([0.0, 0.1, 3.0, 100.0, -5.0]))
    def tick(self, seconds):
        self.now_s += seconds
        self.follow(self.router.on_tick(self.now_s))

    @rule()
    def wake(self):
        """Whoever wakes when told rejects in time, and looks after the engines."""
        wake_s = self.router.next_wake_s()
        assert (wake_s is None) == (not (self.held or (self.placed and self.engines)))
        if wake_s is not None:
            assert wake_s <= min(map(self.expires_s, self.held.values()), default=wake_s)
            self.now_s = max(self.now_s, wake_s)
            self.follow(self.router.on_tick(self.now_s))
            assert all(self.expires_s(request) > self.now_s for request in self.held.values())

    @rule(policy=st.sampled_from(sorted(POLICIES)), ablate=st.sets(st.sampled_from(PARTS)))
    def switch(self, policy, ablate):
        self.policy, self.ablate = policy, frozenset(ablate)
        self.follow(self.router.set_policy(policy, self.now_s, ablate))

    # What always holds

    @invariant()
    def every_request_is_in_one_place(self):
        state = self.router.state(self.now_s)
        assert state.held.num_requests == len(self.held)
        assert state.num_placed == len(self.placed)
        assert +self.router.outcomes == +self.ended
        assert self.num_arrived == len(self.held) + len(self.placed) + self.ended.total()

    @invariant()
    def the_queue_is_bounded(self):
        """Beyond its bounds there is only what had been placed before."""
        held = self.router.state(self.now_s).held
        assert held.num_tokens == sum(r.num_prompt_tokens for r in self.held.values())
        assert held.num_bytes == sum(r.num_bytes for r in self.held.values())
        new = [r for r in self.held.values() if not self.num_attempts[r.id]]
        assert len(new) <= MAX_REQUESTS
        assert sum(r.num_prompt_tokens for r in new) <= MAX_TOKENS
        assert sum(r.num_bytes for r in new) <= MAX_BYTES

    @invariant()
    def ledgers_count_what_is_open_and_what_is_on_its_way(self):
        replicas = self.router.state(self.now_s).replicas
        assert replicas.keys() == self.engines.keys()
        for replica_id, engine in self.engines.items():
            ledger = replicas[replica_id].ledger
            sizes = [
                self.num_booked_tokens[request_id]
                for request_id, number in engine.bookings.items()
                if number > engine.report.last_booking
            ]
            assert ledger.num_open == len(engine.bookings)
            assert ledger.num_unacknowledged == len(sizes)
            assert ledger.num_prefill_tokens == sum(sizes)
            assert (ledger.num_kv_tokens > 0) == bool(sizes)

    @invariant()
    def what_is_cached_is_what_was_told_without_a_gap(self):
        replicas = self.router.state(self.now_s).replicas
        for replica_id, engine in self.engines.items():
            assert replicas[replica_id].num_cached_blocks == engine.told.total()

    @invariant()
    def nobody_waits_for_an_idle_engine(self):
        holds = self.router.state(self.now_s).holds
        breakers = self.breakers()
        for replica_id, engine in self.engines.items():
            breaker = breakers[replica_id]
            # Slow start goes by calls: idle by its report, it may have one whose end is on its way.
            num_calls = max(1.0, breaker.share * MAX_NUM_SEQS)
            is_full = breaker.share < 1.0 and len(engine.calls) >= num_calls
            if breaker.state is not BreakerState.CLOSED or is_full:
                continue
            if engine.accepts_work and (engine.is_idle or not holds):
                waiting = [r.id for r in self.held.values() if r.model in NAMES[replica_id]]
                assert waiting == []

    @invariant()
    def breakers_know_the_calls_and_nobody_waits_to_be_a_probe(self):
        """That there is one at a time, `send` checks."""
        breakers = self.breakers()
        for replica_id, engine in self.engines.items():
            breaker = breakers[replica_id]
            assert breaker.num_open_calls == len(engine.calls)
            assert (breaker.reason is None) == (breaker.state is BreakerState.CLOSED)
            if breaker.state is not BreakerState.HALF_OPEN:
                self.probes.pop(replica_id, None)
            elif (
                engine.accepts_work
                and engine.is_idle
                and self.probes.get(replica_id) not in engine.calls
            ):
                assert [r.id for r in self.held.values() if r.model in NAMES[replica_id]] == []

    def teardown(self):
        """When the load is gone, so is every booking."""
        after_json(self.router.state(self.now_s))
        while self.held or self.placed:
            while self.held:  # who leaves may make room for others
                request_id = next(iter(self.held))
                del self.held[request_id]
                self.ended[Outcome.RENEGED] += 1
                self.follow(self.router.on_cancel(request_id, self.now_s))
            for request_id in list(self.placed):
                self.take_back(request_id)
                self.ended[Outcome.COMPLETED] += 1
                self.follow(self.router.on_finish(request_id, None, self.now_s))
        self.every_request_is_in_one_place()
        self.ledgers_count_what_is_open_and_what_is_on_its_way()
        assert self.router.next_wake_s() is None


Shell.TestCase.settings = settings(
    max_examples=max(300, settings().max_examples),  # this is where the router is held to its word
    stateful_step_count=40,
    deadline=None,
    print_blob=True,
    database=None,
)


# A tenth of a second each; shrinking a failure to something readable takes minutes.
@pytest.mark.timeout(600 + Shell.TestCase.settings.max_examples)
class TestInvariants(Shell.TestCase):
    pass
