"""What does the engine core compute in a step, and what does it tell of it?

Mixins for vLLM's schedulers, which run in its EngineCore process. vLLM has no gauge of pending
prefill, sends its KV events over a socket of their own, and tells of no request which blocks its
prompt consists of. Here all three come with the step that they belong to, in the free-form
`kv_connector_stats` of its `SchedulerStats`. `serving.engine.vllm.patches` has a row for each
mixin.
"""

import time
from collections import deque
from itertools import islice
from operator import attrgetter
from typing import Any

from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVEventBatch
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request, RequestStatus
from vllm.v1.utils import compute_iteration_details

from router.fleet.step_budget import MAX_AHEAD, StepBudget, gives_way, long_part_tokens
from serving.engine.vllm.lifeline import AliveMixin

PENDING = "headway_pending_prefill"  # {request id: tokens to compute}
PROMPTS = "headway_prompts"  # {request id: hashes of its prompt's whole blocks}
ANSWERS = "headway_answers"  # {request id: hash of the last whole block of prompt and answer}
ENDED = "headway_step_ended"  # by the clock of the engine core, seconds
PAIRS = "headway_prefill_pairs"  # of the step: each prefilled token times those before it
NEXT = "headway_next_step"  # launched before this one ended: tokens prefilled, sequences decoding
ITL_TARGET = "headway_itl_target_s"  # in vLLM's `additional_config`, seconds
PART = "headway_part"  # tokens of the next step that a prompt takes from others if it needs several
BLOCKS = "headway_blocks"  # [(hashes stored, hashes removed) | None = all cleared]
ADAPTERS = "headway_adapters"  # names of the LoRA adapters that the step used


class StatsMixin:
    """Attaches to each step's statistics what the gateway routes by."""

    running: list[Request]
    requests: dict[str, Request]
    hash_block_size: int
    lora_config: Any
    overlaps = False  # whether a step is launched before the one before has ended

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._preempted: dict[str, Request] = {}
        self._in_flight: list[SchedulerOutput] = []  # steps that have not ended
        self._last_ended: SchedulerOutput | None = None
        self._new_requests: list[Request] = []
        self._last_blocks: dict[str, int] = {}  # of requests that this step ends
        self._adapters_used: list[str] = []  # by the step that ended last
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
        if self.lora_config is not None:
            self._adapters_used = self._adapters_of(scheduler_output)
        return super().update_from_output(scheduler_output, *args)  # type: ignore[misc]

    def _adapters_of(self, step: SchedulerOutput) -> list[str]:
        """Return the names of the adapters that a step uses, of requests that are still there."""
        requests = map(self.requests.get, step.num_scheduled_tokens)
        loras = [each.lora_request for each in requests if each is not None]
        return sorted({lora.lora_name for lora in loras if lora is not None})

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
        if self._adapters_used:
            reports[ADAPTERS] = self._adapters_used
            self._adapters_used = []
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


class StepBudgetMixin:
    """Keeps prefill from making a step longer than whoever is being answered should wait.

    vLLM fills each step up to `max_num_batched_tokens`, which is its throughput's best and makes
    gaps between tokens as long as a full step takes. Here a step prefills what fits into the ITL
    target (`router.fleet.step_budget`), by the times of the steps so far, and ends with the prompts
    after which that is best (`cut_after`). Of what runs, those that are being answered come first,
    which then always get their token, then prompts by their deadlines. They give way to who waits
    and needs that step (`gives_way`), but never in two steps in a row.
    `max_num_batched_tokens` and `long_prefill_token_threshold` hold beside that.
    """

    running: list[Request]
    waiting: Any
    max_num_scheduled_tokens: int
    max_num_running_reqs: int
    policy: SchedulingPolicy
    num_spec_tokens: int
    scheduler_config: Any
    vllm_config: Any
    lora_config: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._most_tokens = self.max_num_scheduled_tokens
        self._most_each = self.scheduler_config.long_prefill_token_threshold
        config = self.vllm_config.additional_config
        itl_target_s = config.get(ITL_TARGET, 0.0) if isinstance(config, dict) else 0.0
        self._budget = StepBudget(itl_target_s, self._most_tokens)
        self._part = self._most_tokens
        self._deferred: list[Request] = []  # left out of the last step
        # Of each step that has not ended: when made up, tokens prefilled, sequences decoding.
        self._steps: deque[tuple[float, int, int]] = deque()
        self._last_ended_s = 0.0

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        prompts = sorted(filter(_is_prompt, self.running), key=attrgetter("priority"))
        decoding = [request for request in self.running if not _is_prompt(request)]
        num_decoding = len(decoding)
        num_prefill = self._budget.prefill_tokens(num_decoding)
        self._part = long_part_tokens(num_prefill)
        self._deferred, num_prefill = self._planned(prompts, num_prefill, num_decoding)
        if self._deferred and self.lora_config is not None:
            self._deferred = self._keeping_adapters(self._deferred)
        deferred = self._deferred
        if self._most_each and len(self.running) - len(deferred) + len(self.waiting) == 1:
            # vLLM lifts that cap from a prompt that is alone: who comes meanwhile waits for it.
            num_prefill = min(num_prefill, self._most_each)
        num_decode = num_decoding * (1 + self.num_spec_tokens)
        self.max_num_scheduled_tokens = min(self._most_tokens, num_prefill + num_decode)
        self.scheduler_config.long_prefill_token_threshold = min(
            num_prefill, self._most_each or num_prefill
        )
        self.running = decoding + [each for each in prompts if each not in deferred]
        try:
            step = super().schedule(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.running = deferred + self.running
        if num_tokens := step.total_num_scheduled_tokens:
            num_scheduled = step.num_scheduled_tokens
            computed = [num_scheduled.get(request.request_id, 0) for request in decoding]
            num_computing = sum(num > 0 for num in computed)
            self._steps.append((time.monotonic(), num_tokens - sum(computed), num_computing))
        return step

    def _planned(
        self, prompts: list[Request], num_prefill: int, num_decoding: int
    ) -> tuple[list[Request], int]:
        """Return the running prompts to leave out of this step, and the tokens it prefills."""
        has_room = len(self.running) + len(self.waiting) <= self.max_num_running_reqs
        if self.waiting and self.policy == SchedulingPolicy.PRIORITY:
            order = [(each, each.num_tokens - each.num_computed_tokens) for each in prompts]
            order += [(each, each.num_tokens) for each in islice(self.waiting, MAX_AHEAD)]
            order.sort(key=_priority_of_first)  # equal ones: who runs, then who came first
            num_left = [num for _, num in order]
            cut = self._budget.cut_after(num_left, num_prefill, num_decoding)
            left_out = [each for each, _ in order[cut:] if each.status == RequestStatus.RUNNING]
            if cut and (not left_out or (has_room and not self._deferred)):
                return left_out, sum(num_left[:cut])
        return self._prompts_to_defer(prompts, num_prefill), num_prefill

    def _keeping_adapters(self, deferred: list[Request]) -> list[Request]:
        """Return those of these prompts whose adapter the step uses all the same, or has none.

        vLLM lets no more adapters run than can be resident. Those of a prompt that is left out it
        does not see: another's would take the place, and once the prompt came back the core would
        end, as there are too many.
        """
        kept = {_adapter(each) for each in self.running if each not in deferred}
        return [each for each in deferred if not (name := _adapter(each)) or name in kept]

    def _prompts_to_defer(self, prompts: list[Request], num_prefill: int) -> list[Request]:
        """Return the running prompts that this step leaves out."""
        # Those left out come back: the batch must have room for all.
        num_here = len(self.running) + len(self.waiting)
        if self._deferred or not (self.waiting and prompts) or num_here > self.max_num_running_reqs:
            return []
        head = self.waiting.peek_request()
        num_left = sum(each.num_tokens - each.num_computed_tokens for each in prompts)
        return [
            each
            for each in prompts
            if gives_way(num_left, head.num_tokens, each.priority, head.priority, num_prefill)
        ]

    def update_from_output(self, scheduler_output: SchedulerOutput, *args: Any) -> Any:
        outputs = super().update_from_output(scheduler_output, *args)  # type: ignore[misc]
        if scheduler_output.total_num_scheduled_tokens and self._steps:
            now_s = time.monotonic()
            made_s, num_prefill, num_decoding = self._steps.popleft()
            # A step that was launched before the one before it ended began at that end.
            began_s = max(made_s, self._last_ended_s)
            self._last_ended_s = now_s
            self._budget.learn(now_s - began_s, num_prefill, num_decoding)
        return outputs

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats: SchedulerStats | None = super().make_stats(*args, **kwargs)  # type: ignore[misc]
        if stats is not None:
            stats.kv_connector_stats = {**(stats.kv_connector_stats or {}), PART: self._part}
        return stats


def _priority_of_first(prompt: tuple[Request, int]) -> int:
    return prompt[0].priority


def _adapter(request: Request) -> int:
    """Return the number of a request's LoRA adapter; 0 if it has none."""
    return request.lora_request.lora_int_id if request.lora_request is not None else 0


def _is_prompt(request: Request) -> bool:
    """Whether a running request is still to be prefilled, wholly or in part.

    Who is being answered has its newest token left to compute, or by async scheduling none.
    """
    num_left = request.num_tokens - request.num_computed_tokens
    return num_left > 1 or (num_left == 1 and not request.num_output_tokens)


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


class HeadwayScheduler(AliveMixin, StepBudgetMixin, StatsMixin, PreemptionFixMixin, Scheduler):
    """For engines without async scheduling (CPU)."""


class HeadwayAsyncScheduler(
    AliveMixin, StepBudgetMixin, StatsMixin, PreemptionFixMixin, AsyncScheduler
):
    """For engines with async scheduling (CUDA)."""

    overlaps = True
