"""What does the engine core compute in a step, and what does it tell of it?

Mixins for vLLM's schedulers, which run in its EngineCore process. vLLM has no gauge of pending
prefill, sends its KV events over a socket of their own, and tells of no request which blocks its
prompt consists of. Here all three come with the step that they belong to, in the free-form
`kv_connector_stats` of its `SchedulerStats`. `serving.engine.vllm.patches` has a row for each
mixin.
"""

import time
from typing import Any

from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVEventBatch
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request, RequestStatus
from vllm.v1.utils import compute_iteration_details

from serving.engine.vllm.lifeline import AliveMixin

PENDING = "headway_pending_prefill"  # {request id: tokens to compute}
PROMPTS = "headway_prompts"  # {request id: hashes of its prompt's whole blocks}
ANSWERS = "headway_answers"  # {request id: hash of the last whole block of prompt and answer}
ENDED = "headway_step_ended"  # by the clock of the engine core, seconds
PAIRS = "headway_prefill_pairs"  # of the step: each prefilled token times those before it
NEXT = "headway_next_step"  # launched before this one ended: tokens prefilled, sequences decoding
BLOCKS = "headway_blocks"  # [(hashes stored, hashes removed) | None = all cleared]


class StatsMixin:
    """Attaches to each step's statistics what the gateway routes by."""

    running: list[Request]
    hash_block_size: int
    overlaps = False  # whether a step is launched before the one before has ended

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._preempted: dict[str, Request] = {}
        self._in_flight: list[SchedulerOutput] = []  # steps that have not ended
        self._last_ended: SchedulerOutput | None = None
        self._new_requests: list[Request] = []
        self._last_blocks: dict[str, int] = {}  # of requests that this step ends
        self._events = _KvEventTap(self.kv_event_publisher)  # type: ignore[has-type]
        self.kv_event_publisher = self._events

    def add_request(self, request: Request) -> None:
        super().add_request(request)  # type: ignore[misc]
        self._new_requests.append(request)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]
        self._preempted[request.request_id] = request

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        # The last token was generated and not computed, so a block that it fills is not cached.
        num_blocks = (request.num_tokens - 1) // self.hash_block_size
        if hashes := request.block_hashes[:num_blocks]:
            self._last_blocks[request.request_id] = maybe_convert_block_hash(hashes[-1])
        return super()._free_request(request, *args, **kwargs)  # type: ignore[misc]

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)  # type: ignore[misc]
        self._in_flight.append(scheduler_output)

    def update_from_output(self, scheduler_output: SchedulerOutput, *args: Any) -> Any:
        for index, step in enumerate(self._in_flight):  # they end in their order
            if step is scheduler_output:
                del self._in_flight[: index + 1]
                break
        self._last_ended = scheduler_output
        return super().update_from_output(scheduler_output, *args)  # type: ignore[misc]

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)  # type: ignore[misc]
        if stats is None:
            return None
        # A decoding request has exactly its newest token left to compute; that
        # is decode. One without any output yet is still in prefill, however
        # little is left. What async scheduling has in flight vLLM counts as computed.
        pending = {
            request.request_id: max(0, request.num_tokens - request.num_computed_tokens)
            for request in self.running
            if not request.num_output_tokens or request.num_tokens - request.num_computed_tokens > 1
        }
        for step in self._in_flight:
            for request_id, num_tokens in step.num_scheduled_tokens.items():
                if request_id in pending:
                    pending[request_id] += num_tokens
        for request_id, request in list(self._preempted.items()):
            if request.status == RequestStatus.PREEMPTED:
                pending[request_id] = request.num_tokens - request.num_computed_tokens
            else:
                del self._preempted[request_id]
        reports: dict[str, Any] = {PENDING: pending, ENDED: time.monotonic()}
        if self._last_ended is not None and (num_pairs := _prefill_pairs(self._last_ended)):
            reports[PAIRS] = num_pairs
        if self.overlaps:
            reports[NEXT] = _composition(self._in_flight[0]) if self._in_flight else (0, 0)
        if self._new_requests:
            reports[PROMPTS] = {
                request.request_id: [
                    maybe_convert_block_hash(each) for each in request.block_hashes
                ]
                for request in self._new_requests
            }
            self._new_requests = []
        if self._last_blocks:
            reports[ANSWERS] = self._last_blocks
            self._last_blocks = {}
        if self._events.changes:
            reports[BLOCKS] = self._events.changes
            self._events.changes = []
        stats.kv_connector_stats = {**(stats.kv_connector_stats or {}), **reports}
        return stats


def _composition(step: SchedulerOutput) -> tuple[int, int]:
    """Return what a step computes: tokens prefilled, sequences decoding."""
    details = compute_iteration_details(step)
    return details.num_ctx_tokens, details.num_generation_requests


def _prefill_pairs(step: SchedulerOutput) -> float:
    """Return the attention that a step's prefills take: their tokens times those before each."""
    num_scheduled, cached = step.num_scheduled_tokens, step.scheduled_cached_reqs
    if step.total_num_scheduled_tokens == len(num_scheduled):
        return 0.0  # the usual step: everybody decodes
    num_computed = {new.req_id: new.num_computed_tokens for new in step.scheduled_new_reqs}
    rows = zip(cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True)
    num_computed |= {request_id: num for request_id, num, num_output in rows if not num_output}
    return sum(
        num_scheduled[request_id] * (num + num_scheduled[request_id] / 2)
        for request_id, num in num_computed.items()
    )


class _KvEventTap:
    """Keeps KV events for the statistics of their step, and passes them on as configured."""

    def __init__(self, publisher: Any) -> None:
        self.changes: list[tuple[list[int], list[int]] | None] = []
        self._publisher = publisher

    def publish(self, events: KVEventBatch) -> None:
        for event in events.events:
            if isinstance(event, BlockStored | BlockRemoved):
                # Models of several kinds of layers keep each block once per kind.
                if event.group_idx:
                    continue
                hashes = event.block_hashes
                self.changes.append(
                    (hashes, []) if isinstance(event, BlockStored) else ([], hashes)
                )
            else:
                self.changes.append(None)
        self._publisher.publish(events)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._publisher, name)


class PrefillCapMixin:
    """Keeps a long prompt from filling a step.

    vLLM caps what one long prompt takes of a step (`long_prefill_token_threshold`),
    but lifts the cap from a prompt that is alone, and serves prompts that run before
    those that wait. A request that arrives in the middle of such a step waits for all
    of it, and then for the next chunk of the long prompt. Here the cap stays. A step
    for which prompts with an earlier deadline wait goes to them and to the decoding
    requests alone, but never two in a row: the long prompt gets at least every second
    step.
    """

    running: list[Request]
    waiting: Any
    max_num_scheduled_tokens: int
    max_num_running_reqs: int
    scheduler_config: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._step_budget = self.max_num_scheduled_tokens
        self._has_deferred = False

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        cap = self.scheduler_config.long_prefill_token_threshold
        num_here = len(self.running) + len(self.waiting)
        self.max_num_scheduled_tokens = cap if cap and num_here == 1 else self._step_budget
        deferred = self._prompts_to_defer(cap)
        self._has_deferred = bool(deferred)
        if not deferred:
            return super().schedule(*args, **kwargs)  # type: ignore[misc]
        self.running = [request for request in self.running if request not in deferred]
        try:
            return super().schedule(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.running = deferred + self.running

    def _prompts_to_defer(self, cap: int) -> list[Request]:
        """Return the long prompts that this step leaves out."""
        if self._has_deferred or not self.waiting:
            return []
        # Those left out come back: the batch must have room for all.
        if len(self.running) + len(self.waiting) > self.max_num_running_reqs:
            return []
        priority = self.waiting.peek_request().priority
        return [
            request
            for request in self.running
            if not request.num_output_tokens
            and request.priority > priority
            and request.num_tokens - request.num_computed_tokens > cap > 0
        ]


class PreemptionFixMixin:
    """Takes blocks that nobody computed out of the prefix cache.

    vLLM puts a block into its prefix cache when it schedules the tokens that fill
    it. By priority it may preempt, later in the same step, a request that is already
    scheduled. The request's tokens are withdrawn and its blocks freed, but without
    this the next request with the same prompt would find them in the cache.
    """

    kv_cache_manager: Any

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        # The tokens of this step are not counted as computed yet.
        num_computed = request.num_computed_tokens
        managers = self.kv_cache_manager.coordinator.single_type_managers
        groups = self.kv_cache_manager.get_block_ids(request.request_id)
        void = {
            block_id
            for manager, block_ids in zip(managers, groups, strict=True)
            for block_id in block_ids[num_computed // manager.block_size :]
        }
        super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]
        self.kv_cache_manager.evict_blocks(void)


class HeadwayScheduler(AliveMixin, PrefillCapMixin, StatsMixin, PreemptionFixMixin, Scheduler):
    """For engines without async scheduling (CPU)."""


class HeadwayAsyncScheduler(
    AliveMixin, PrefillCapMixin, StatsMixin, PreemptionFixMixin, AsyncScheduler
):
    """For engines with async scheduling (CUDA)."""

    overlaps = True
