"""How long anybody waits, whoever comes after: generated traffic on one stepping engine."""

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from router.core.carry_out import carry_out
from router.core.router import Router
from router.core.settings import RouterSettings
from router.queueing.deadline import ttft_deadline_s
from router.types import Dispatch, EngineSnapshot, Request, RequestClass, Usage
from tests.support.builders import info, req
from tests.support.shell import IdleShell

BUDGET, CHUNK, STEP_S, KV_TOKENS = 100, 50, 0.1, 2000
# A long document that finds the engine full, and short questions that never stop.
SIZES = st.sampled_from([1, 5, 40, 50, 60, 300, 1500])


@dataclass
class Job:
    request: Request
    booking: int
    num_to_prefill: int
    num_to_decode: int
    num_kv_tokens: int = 0


class Engine:
    """Prefills in order of arrival, short prompts beside a long one; decodes a token a step."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.seq = 0
        self.last_booking = 0

    def take(self, request: Request, booking: int) -> None:
        self.last_booking = booking
        self.jobs.append(Job(request, booking, max(1, request.num_prompt_tokens), 10))

    def step(self) -> list[Job]:
        """Those that have ended with it."""
        budget = BUDGET
        for job in self.jobs:
            if job.num_to_prefill:
                num = min(budget, CHUNK, job.num_to_prefill)
                job.num_to_prefill -= num
                job.num_kv_tokens += num
                budget -= num
            else:
                job.num_to_decode -= 1
                job.num_kv_tokens += 1
        ended = [job for job in self.jobs if not job.num_to_decode]
        self.jobs = [job for job in self.jobs if job.num_to_decode]
        return ended

    def snapshot(self) -> EngineSnapshot:
        self.seq += 1
        pending = [job.num_to_prefill for job in self.jobs if job.num_to_prefill]
        num_decoding = len(self.jobs) - len(pending)
        return EngineSnapshot(
            seq=self.seq,
            last_booking=self.last_booking,
            num_running_reqs=len(self.jobs),
            num_inflight_reqs=len(self.jobs),
            num_free_kv_tokens=KV_TOKENS - sum(job.num_kv_tokens for job in self.jobs),
            num_pending_prefill_tokens=sum(pending),
            num_step_demand_tokens=sum(min(CHUNK, num) for num in pending),
            num_decoding_reqs=num_decoding,
            step_s=STEP_S,
            step_num_prefill_tokens=BUDGET if pending else 0,
            step_num_decode_reqs=num_decoding,
            num_steps_total=self.seq,
        )


def dispatched_s(arrivals: list[Request], router_settings: RouterSettings) -> dict[str, float]:
    """When each request went to the engine; nobody is left when this returns."""
    router, engine = Router(router_settings), Engine()
    router.on_replica_up(
        "r0",
        info(
            max_num_batched_tokens=BUDGET,
            max_prefill_chunk=CHUNK,
            num_kv_tokens=KV_TOKENS,
            max_num_seqs=16,
        ),
        0.0,
    )
    waiting = sorted(arrivals, key=lambda request: -request.arrival_s)
    requests = {request.id: request for request in arrivals}
    went_s: dict[str, float] = {}

    class Shell(IdleShell):
        def __init__(self, now_s: float) -> None:
            self.now_s = now_s

        def dispatch(self, decision: Dispatch) -> None:
            went_s[decision.request_id] = self.now_s
            engine.take(requests[decision.request_id], decision.booking)

    now_s = 0.0
    while waiting or engine.jobs or len(went_s) < len(requests):
        end_s = now_s + STEP_S
        while waiting and waiting[-1].arrival_s < end_s:
            request = waiting.pop()
            carry_out(router.on_arrival(request, request.arrival_s), Shell(request.arrival_s))
        now_s = end_s
        ended = engine.step()
        for job in ended:
            usage = Usage(num_prompt_tokens=job.request.num_prompt_tokens, num_output_tokens=10)
            carry_out(router.on_finish(job.request.id, usage, now_s), Shell(now_s))
        carry_out(router.on_snapshot("r0", engine.snapshot(), now_s), Shell(now_s))
        carry_out(router.on_tick(now_s), Shell(now_s))
        assert now_s < 4000.0, "somebody starves"
    return went_s


@settings(deadline=None)
@given(
    gaps_and_sizes=st.lists(
        st.tuples(st.sampled_from([0.0, 0.01, 0.05, 0.3]), SIZES, st.sampled_from(RequestClass)),
        min_size=1,
        max_size=120,
    )
)
def test_nobody_is_passed_any_more_past_the_deadline(gaps_and_sizes):
    """But by who is due sooner: so what is waited for then is known, and bounded.

    What came by then, and what the engine had. A step passes until the router hears again.
    """
    arrivals, now_s = [], 0.0
    for number, (gap_s, size, priority_class) in enumerate(gaps_and_sizes):
        now_s += gap_s
        arrivals.append(
            req(f"q{number}", size, arrival_s=now_s, priority_class=priority_class, tenant="t")
        )
    # Targets below what prefill takes, so that who is due sooner is who goes first: above it, the
    # order is by how fast engines are (`router.queueing.deadline`).
    router_settings = RouterSettings(
        max_hold_s=3600.0, ttft_target_batch_s=20.0, ttft_target_s_per_token=2e-4
    )
    went_s = dispatched_s(arrivals, router_settings)
    due_s = {each.id: ttft_deadline_s(each, router_settings) for each in arrivals}
    for early in arrivals:
        for late in arrivals:
            if due_s[early.id] < due_s[late.id] and went_s[late.id] < went_s[early.id]:
                was_waiting = early.arrival_s <= went_s[late.id]
                assert not was_waiting or went_s[late.id] <= due_s[early.id] + STEP_S
