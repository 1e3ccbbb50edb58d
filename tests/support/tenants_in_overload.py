"""Tenants under overload, in virtual time over the real router."""

import heapq
import random
from collections import Counter
from dataclasses import dataclass, field

from router.core.carry_out import carry_out
from router.core.router import Router
from router.core.settings import RouterSettings
from router.types import Dispatch, EngineSnapshot, Reject, Request, Usage
from tests.support.builders import info, req
from tests.support.shell import IdleShell

NUM_TOKENS_PER_STEP = 100


STEP_S = 0.1


DECODES_PER_STEP = 1

SHORT, LONG, MIXED = (20, 40), (300, 600), (20, 40, 600)  # prompt sizes, tokens


@dataclass
class Engine:
    """Prefills first come, first served, 100 tokens a step of 0.1 s, beside all decodes."""

    prefilling: list[list] = field(default_factory=list)  # request, tokens left
    decoding: list[list] = field(default_factory=list)  # request, tokens left
    last_booking: int = 0
    seq: int = 0

    def step(self) -> list[Request]:
        """Requests that end with this step."""
        budget = NUM_TOKENS_PER_STEP
        for entry in self.decoding:
            entry[1] -= 1
        ended = [request for request, left in self.decoding if left <= 0]
        self.decoding = [entry for entry in self.decoding if entry[1] > 0]
        while self.prefilling and budget:
            entry = self.prefilling[0]
            took = min(budget, entry[1])
            entry[1] -= took
            budget -= took
            if not entry[1]:
                self.prefilling.pop(0)
                self.decoding.append([entry[0], entry[0].max_output_tokens])
        return ended

    def snapshot(self) -> EngineSnapshot:
        self.seq += 1
        num_pending = sum(left for _, left in self.prefilling)
        kv = sum(request.num_prompt_tokens + 200 for request, _ in self.prefilling + self.decoding)
        return EngineSnapshot(
            seq=self.seq,
            last_booking=self.last_booking,
            num_running_reqs=len(self.prefilling) + len(self.decoding),
            num_inflight_reqs=len(self.prefilling) + len(self.decoding),
            num_decoding_reqs=len(self.decoding),
            num_free_kv_tokens=max(0, 20_000 - kv),
            num_pending_prefill_tokens=num_pending,
            num_step_demand_tokens=num_pending,
            prefill_tokens_per_s=NUM_TOKENS_PER_STEP / STEP_S,
            step_s=STEP_S,
            step_num_prefill_tokens=NUM_TOKENS_PER_STEP,
            num_steps_total=self.seq,
        )


class World(IdleShell):
    """Two engines behind a router, and tenants that ask for more than they can give."""

    def __init__(self, num_engines: int = 2, **settings) -> None:
        # Fairness of the queue; that of the door is in `test_overload`.
        self.router = Router(RouterSettings(**{"max_hold_s": 1e6, "max_late_s": None} | settings))
        self.engines = {f"r{index}": Engine() for index in range(num_engines)}
        self.requests: dict[str, Request] = {}
        self.num_tokens: Counter[str] = Counter()  # served, prompt and output, by tenant
        self.waited_s: dict[str, list[float]] = {}
        self.placed_s: dict[str, float] = {}
        self.refused: dict[str, Reject] = {}
        self.now_s = 0.0
        for engine_id in self.engines:
            engine = info(max_num_batched_tokens=NUM_TOKENS_PER_STEP, num_kv_tokens=20_000)
            self.router.on_replica_up(engine_id, engine, 0.0)

    def run(self, arrivals: list[Request], until_s: float) -> None:
        events = [(request.arrival_s, 0, index, request) for index, request in enumerate(arrivals)]
        events += [(STEP_S, 1, index, name) for index, name in enumerate(self.engines)]
        heapq.heapify(events)
        while events and events[0][0] <= until_s:
            self.now_s, kind, index, what = heapq.heappop(events)
            if kind == 0:
                self.requests[what.id] = what
                carry_out(self.router.on_arrival(what, self.now_s), self)
            else:
                self.step(what)
                heapq.heappush(events, (self.now_s + STEP_S, 1, index, what))

    def step(self, name: str) -> None:
        engine = self.engines[name]
        for request in engine.step():
            num_output = request.max_output_tokens
            self.num_tokens[request.tenant] += request.num_prompt_tokens + num_output
            usage = Usage(num_prompt_tokens=request.num_prompt_tokens, num_output_tokens=num_output)
            carry_out(self.router.on_finish(request.id, usage, self.now_s), self)
        carry_out(self.router.on_snapshot(name, engine.snapshot(), self.now_s), self)

    def dispatch(self, decision: Dispatch) -> None:
        request = self.requests[decision.request_id]
        engine = self.engines[decision.replica_id]
        engine.prefilling.append([request, request.num_prompt_tokens])
        engine.last_booking = decision.booking
        waits_s = self.waited_s.setdefault(request.tenant, [])
        waits_s.append(self.now_s - request.arrival_s)
        self.placed_s[request.id] = self.now_s

    def reject(self, decision: Reject) -> None:
        self.refused[decision.request_id] = decision


def flood(
    rng: random.Random,
    tenant: str,
    weight: float,
    tokens_per_s: float,
    until_s: float,
    sizes: tuple[int, ...],
    outputs: tuple[int, ...],
    **fields,
) -> list[Request]:
    """Poisson arrivals of so many prompt tokens per second."""
    now_s, requests = 0.0, []
    while now_s < until_s:
        num_tokens = rng.choice(sizes)
        now_s += rng.expovariate(tokens_per_s / num_tokens)
        requests.append(
            req(
                f"{tenant}{len(requests)}",
                num_tokens,
                max_output_tokens=rng.choice(outputs),
                tenant=tenant,
                weight=weight,
                arrival_s=now_s,
                **fields,
            )
        )
    return requests
