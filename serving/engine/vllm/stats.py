"""What does one vLLM engine have to do now, by its own statistics?"""

import time
from collections import Counter
from collections.abc import Callable, Mapping

from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.output_processor import RequestState
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from router import EngineSnapshot
from router.fleet.block_log import BlockLog
from router.types import PREFILL_RATE_FORGETTING
from serving.engine.vllm.adapters.watch import AdapterWatch
from serving.engine.vllm.scheduler import (
    ADAPTERS,
    ANSWERS,
    BLOCKS,
    ENDED,
    NEXT,
    PAIRS,
    PART,
    PENDING,
    PROMPTS,
)
from serving.stream.accounting import RequestAccounting, current_accounting

# Two ends further apart than this are not of one step: the engine slept between.
_LONGEST_STEP_S = 60.0


class EngineStats(StatLoggerBase):
    """Keeps what an `EngineSnapshot` needs; reading it costs one pass over live requests.

    `record` runs on the event loop after every engine step, after the step's
    outputs were handed to their requests, and never while the engine is idle.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._config = vllm_config
        scheduler = vllm_config.scheduler_config
        self._max_chunk = scheduler.long_prefill_token_threshold or scheduler.max_num_batched_tokens
        self._last = SchedulerStats()
        self._pending: dict[str, int] = {}  # prefill tokens to come, by vLLM's request id
        self.blocks = BlockLog()
        self._live: Mapping[str, RequestState] = {}
        # By vLLM's own request id: the client's may be in the engine twice, as when its stream
        # was lost and it goes on here before what was lost has left.
        self._accountings: dict[str, RequestAccounting] = {}
        self._on_step: Callable[[], None] = lambda: None
        self.adapters: AdapterWatch | None = None  # where the engine takes LoRA adapters
        self.reset_steps()

    def reset_steps(self) -> None:
        """Forget all steps so far, as those of a warm-up: they took longer than any to come."""
        self._last_step_s: float | None = None
        self._prefill_step_tokens = 0.0
        self._prefill_step_s = 0.0
        self.step_s = 0.0
        self.step_num_prefill_tokens = 0
        self.step_num_prefill_pairs = 0.0
        self.step_num_decode_reqs = 0
        self.num_prefill_tokens_total = 0
        self.num_prefix_queries_total = 0
        self.num_prefix_hits_total = 0
        self.num_preemptions_total = 0
        self.num_output_tokens_total = 0
        self.num_steps_total = 0

    def attach(self, live: Mapping[str, RequestState]) -> None:
        """Take vLLM's own requests, by its request ids, for those that the engine has."""
        self._live = live

    def register_request(self, request: EngineCoreRequest, index: int) -> None:
        """Connect a sequence of a request, just registered, with the accounting of its task."""
        if len(self._live) == 1:
            # It was idle. After an abort no step says so, and the pause would be one.
            self._last_step_s = None
        if (accounting := current_accounting.get()) is None:
            return
        # Before it goes to the engine core. The client's own is in it: `router.queueing.deadline`.
        request.priority = accounting.priority
        if not accounting.entered:
            accounting.entered, accounting.num_prompt_tokens = True, 0
        if index == 0:  # n > 1 shares one prompt
            accounting.num_prompt_tokens += len(request.prompt_token_ids or ())
        self._accountings[request.request_id] = accounting

    def count_finished(self, state: RequestState, stats: IterationStats | None) -> None:
        """Add what a sequence took to the accounting of its request."""
        accounting = self._accountings.get(state.request_id)
        if accounting is not None and stats is not None:
            accounting.num_output_tokens += state.stats.num_generation_tokens
            accounting.num_cached_tokens += state.num_cached_tokens

    def forget(self, accounting: RequestAccounting) -> list[str]:
        """Drop a request that has ended, in whatever way. Return what the engine still has of it.

        By vLLM's own request ids.
        """
        known = [key for key, value in self._accountings.items() if value is accounting]
        for request_id in known:
            del self._accountings[request_id]
        return [request_id for request_id in known if request_id in self._live]

    def subscribe(self, on_step: Callable[[], None]) -> None:
        """Have `on_step()` called on the event loop after every engine step."""
        self._on_step = on_step

    def tell(self) -> None:
        """Have a snapshot taken that no step gives occasion to."""
        self._on_step()

    def log_engine_initialized(self) -> None:
        """Do nothing: part of vLLM's interface."""

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """Take in a step that has just ended, and call what `subscribe` was given."""
        if scheduler_stats is not None:
            self._record_step(scheduler_stats)
        if iteration_stats is not None:
            self.num_output_tokens_total += iteration_stats.num_generation_tokens
            self.num_preemptions_total += iteration_stats.num_preempted_reqs
        self._on_step()

    def _record_step(self, stats: SchedulerStats) -> None:
        self._last = stats
        reports = stats.kv_connector_stats or {}
        self._pending = reports.get(PENDING, {})
        self._max_chunk = reports.get(PART, self._max_chunk)
        for change in reports.get(BLOCKS, ()):
            if change is None:
                self.blocks.clear()
            else:
                stored, removed = change
                self.blocks.store(stored)
                self.blocks.remove(removed)
        for request_id, hashes in reports.get(PROMPTS, {}).items():
            self._report_prompt(request_id, hashes)
        for request_id, last_block in reports.get(ANSWERS, {}).items():
            if (accounting := self._accountings.get(request_id)) is not None:
                accounting.last_block = last_block
        self.num_prefix_queries_total += stats.prefix_cache_stats.queries
        self.num_prefix_hits_total += stats.prefix_cache_stats.hits
        if (details := stats.iteration_details) is None:
            return
        self.num_steps_total += 1
        self.num_prefill_tokens_total += details.num_ctx_tokens
        # vLLM's own elapsed_ms means nothing under the in-process executor: the gap
        # between the ends of two steps of a busy engine is the step. By the core's
        # clock: a loop that reads a long prompt gets to several records at once, and
        # then a step of 6 ms would be one of 30, followed by some of none.
        now_s = reports.get(ENDED, time.monotonic())
        if self.adapters is not None and self.adapters.on_step(reports.get(ADAPTERS, ())):
            # What loading took is no part of what such a step takes.
            self._last_step_s, self.step_s = None, 0.0
        if self._last_step_s is not None:
            step_s = now_s - self._last_step_s
            if step_s < _LONGEST_STEP_S:
                self.step_s = step_s
                self.step_num_prefill_tokens = details.num_ctx_tokens
                self.step_num_prefill_pairs = reports.get(PAIRS, 0.0)
                self.step_num_decode_reqs = details.num_generation_requests
                if NEXT in reports:
                    # Under async scheduling the next step is launched before this one is looked
                    # at, and what its launch takes is in this one's time, the rest in its own.
                    # Half of either's tokens in each: then all of its time is somewhere, in
                    # whatever parts. (On an H100, one of 256 tokens: 15 and 3 ms.)
                    num_tokens, num_decodes = reports[NEXT]
                    self.step_num_prefill_tokens = -(-(details.num_ctx_tokens + num_tokens) // 2)
                    self.step_num_decode_reqs = -(
                        -(details.num_generation_requests + num_decodes) // 2
                    )
                if self.step_num_prefill_tokens:
                    keep = 1.0 - PREFILL_RATE_FORGETTING
                    self._prefill_step_tokens = (
                        keep * self._prefill_step_tokens + self.step_num_prefill_tokens
                    )
                    self._prefill_step_s = keep * self._prefill_step_s + step_s
        busy = stats.num_running_reqs or stats.num_waiting_reqs or stats.num_skipped_waiting_reqs
        self._last_step_s = now_s if busy else None

    def _report_prompt(self, request_id: str, hashes: list[int]) -> None:
        """Pass on a prompt's size and block hashes; only the first, where one call has several."""
        state = self._live.get(request_id)
        accounting = self._accountings.get(request_id)
        if state is not None and accounting is not None and accounting.on_prompt is not None:
            accounting.on_prompt(state.prompt_len, hashes)
            accounting.on_prompt = None

    def snapshot(self, seq: int, accountings: list[RequestAccounting]) -> EngineSnapshot:
        """Return the state now. `accountings` are of all requests in the replica."""
        # After an abort nothing steps: the last statistics may be of requests that are gone.
        stats = self._last if self._live else SchedulerStats()
        num_left = [
            max(1, accounting.num_prompt_tokens - accounting.num_expected_cached_tokens)
            for accounting in accountings
            if not (accounting.entered or accounting.is_parked)
        ]
        num_decoding = num_context = 0
        for request_id, state in self._live.items():
            if request_id in self._pending:  # in the middle of its prefill, or preempted
                num_left.append(self._pending[request_id])
            elif state.is_prefilling:  # not yet scheduled: all that is not cached is to come
                accounting = self._accountings.get(request_id)
                num_cached = accounting.num_expected_cached_tokens if accounting is not None else 0
                num_left.append(max(1, state.prompt_len - num_cached))
            else:
                num_decoding += 1
                num_context += state.prompt_len + state.stats.num_generation_tokens
        adapters = self.adapters
        return EngineSnapshot(
            seq=seq,
            num_running_reqs=stats.num_running_reqs,
            num_waiting_reqs=stats.num_waiting_reqs + stats.num_skipped_waiting_reqs,
            num_inflight_reqs=len(accountings),
            kv_cache_usage=stats.kv_cache_usage,
            num_free_kv_tokens=round((1.0 - stats.kv_cache_usage) * self.num_kv_tokens),
            num_pending_prefill_tokens=sum(num_left),
            num_step_demand_tokens=sum(min(num, self._max_chunk) for num in num_left),
            num_decoding_reqs=num_decoding,
            num_decode_context_tokens=num_context,
            prefill_tokens_per_s=(
                self._prefill_step_tokens / self._prefill_step_s if self._prefill_step_s else 0.0
            ),
            step_s=self.step_s,
            step_num_prefill_tokens=self.step_num_prefill_tokens,
            step_num_prefill_pairs=self.step_num_prefill_pairs,
            step_num_decode_reqs=self.step_num_decode_reqs,
            num_prefill_tokens_total=self.num_prefill_tokens_total,
            num_prefix_queries_total=self.num_prefix_queries_total,
            num_prefix_hits_total=self.num_prefix_hits_total,
            num_preemptions_total=self.num_preemptions_total,
            num_output_tokens_total=self.num_output_tokens_total,
            num_steps_total=self.num_steps_total,
            adapters=adapters.state(self._num_by_adapter()) if adapters is not None else None,
            adapter_paths=adapters.paths if adapters is not None else None,
        )

    def _num_by_adapter(self) -> dict[str, int]:
        """Return how many sequences the engine has for each LoRA adapter, running or waiting."""
        return dict(Counter(name for each in self._live.values() if (name := each.lora_name)))

    @property
    def num_kv_tokens(self) -> int:
        """Return the capacity of the KV cache, tokens; vLLM keeps one block for itself."""
        cache = self._config.cache_config
        return max(0, (cache.num_gpu_blocks or 0) - 1) * cache.block_size
