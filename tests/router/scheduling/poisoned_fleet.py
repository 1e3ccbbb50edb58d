"""Engines in virtual time, and requests of which some end the engine that prefills them."""

import heapq
import itertools
from collections import Counter
from dataclasses import dataclass, field

from router.core.carry_out import carry_out
from router.core.router import Router
from router.core.settings import RouterSettings
from router.types import Dispatch, Fail, Reject, Request, Usage
from tests.support.builders import info, req, snapshot
from tests.support.shell import IdleShell

PREFILL_S, TOKENS_PER_S, NUM_TOKENS = 0.3, 20.0, 40
RESTART_S = 30.0


@dataclass
class Life:
    """One engine from its start to its end."""

    replica_id: str
    seq: int = 0
    last_booking: int = 0
    answered_s: dict[str, float] = field(default_factory=dict)
    open: set[str] = field(default_factory=set)


class PoisonedFleet(IdleShell):
    """A world in which a poison ends its engine `deadly_s` after it got there."""

    def __init__(self, num_engines: int, poisons: dict[str, float], **settings) -> None:
        """`poisons`: by name, seconds until the engine dies of it."""
        self.router = Router(RouterSettings(**settings))
        self.now_s = 0.0
        self.events: list = []
        self.order = itertools.count()
        self.engines: dict[str, Life] = {}
        self.poisons = poisons
        self.requests: dict[str, Request] = {}
        self.ended_by: Counter[str] = Counter()  # engines, by poison
        self.was_last: list[str] = []  # poisons that ended the last engine, not restarted since
        self.done: dict[str, object] = {}  # "completed", or the decision that ended it
        self.names = (f"r{number}" for number in itertools.count())
        self.first_death_s: dict[str, float] = {}
        self.up_s: dict[str, float] = {}
        for _ in range(num_engines):
            self.start_engine()
        self.at(0.0, self.report)

    def at(self, time_s: float, action, *args) -> None:
        heapq.heappush(self.events, (time_s, next(self.order), action, args))

    def run(self, until_s: float) -> None:
        while self.events and self.events[0][0] <= until_s:
            self.now_s, _, action, args = heapq.heappop(self.events)
            action(*args)
            wake_s = self.router.next_wake_s()
            if wake_s is not None and wake_s <= self.now_s:
                carry_out(self.router.on_tick(self.now_s), self)

    # Engines

    def start_engine(self) -> None:
        replica_id = next(self.names)
        self.engines[replica_id] = Life(replica_id)
        self.up_s[replica_id] = self.now_s
        engine = info(max_num_batched_tokens=2000, heartbeat_s=0.5)
        carry_out(self.router.on_replica_up(replica_id, engine, self.now_s), self)

    def report(self) -> None:
        for life in list(self.engines.values()):
            life.seq += 1
            decoding = len(life.answered_s)
            state = snapshot(
                life.seq,
                last_booking=life.last_booking,
                num_inflight_reqs=len(life.open),
                num_running_reqs=len(life.open),
                num_decoding_reqs=decoding,
                num_steps_total=life.seq,
            )
            carry_out(self.router.on_snapshot(life.replica_id, state, self.now_s), self)
        carry_out(self.router.on_tick(self.now_s), self)
        self.at(self.now_s + 0.1, self.report)

    def die(self, life: Life, request_id: str) -> None:
        if self.engines.get(life.replica_id) is not life or request_id not in life.open:
            return
        poison = request_id.partition("#")[0]
        self.ended_by[poison] += 1
        first_s = self.first_death_s.setdefault(poison, self.now_s)
        is_known = self.ended_by[poison] > 1
        if is_known and len(self.engines) == 1 and self.up_s[life.replica_id] <= first_s:
            self.was_last.append(poison)
        del self.engines[life.replica_id]
        self.at(self.now_s + RESTART_S, self.start_engine)
        carry_out(self.router.on_replica_down(life.replica_id, self.now_s), self)
        for lost_id in list(life.open):
            answered_s = life.answered_s.get(lost_id, self.now_s)
            num_tokens = int((self.now_s - answered_s) * TOKENS_PER_S)
            decisions = self.router.failures.on_attempt_failed(
                lost_id,
                life.replica_id,
                None,
                self.now_s,
                has_begun=num_tokens > 0,
                num_output_tokens=num_tokens,
            )
            life.open.discard(lost_id)
            carry_out(decisions, self)

    # Requests

    def arrive(self, request_id: str) -> None:
        body = request_id.partition("#")[0]
        request = req(request_id, fingerprint=hash(body), arrival_s=self.now_s)
        self.requests[request_id] = request
        carry_out(self.router.on_arrival(request, self.now_s), self)

    def dispatch(self, decision: Dispatch) -> None:
        life = self.engines[decision.replica_id]
        life.open.add(decision.request_id)
        life.last_booking = decision.booking
        poison = decision.request_id.partition("#")[0]
        if poison in self.poisons:
            self.at(self.now_s + self.poisons[poison], self.die, life, decision.request_id)
        self.at(self.now_s + PREFILL_S, self.answer, life, decision.request_id)

    def answer(self, life: Life, request_id: str) -> None:
        if request_id not in life.open or life.replica_id not in self.engines:
            return
        life.answered_s[request_id] = self.now_s
        carry_out(self.router.on_answer(request_id, life.replica_id, self.now_s), self)
        carry_out(self.router.on_first_token(request_id, self.now_s), self)
        self.at(self.now_s + NUM_TOKENS / TOKENS_PER_S, self.finish, life, request_id)

    def finish(self, life: Life, request_id: str) -> None:
        if request_id not in life.open or life.replica_id not in self.engines:
            return
        life.open.discard(request_id)
        life.answered_s.pop(request_id)
        self.done[request_id] = "completed"
        usage = Usage(num_prompt_tokens=10, num_output_tokens=NUM_TOKENS)
        carry_out(self.router.on_finish(request_id, usage, self.now_s), self)

    def reject(self, decision: Reject) -> None:
        self.done[decision.request_id] = decision

    def fail(self, decision: Fail) -> None:
        self.done[decision.request_id] = decision
