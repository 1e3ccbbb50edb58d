"""vLLM's schedulers, telling per request how much prefill is left.

vLLM 0.32 publishes no gauge of pending prefill (vllm#38025). These subclasses
run inside vLLM's EngineCore process and attach to each step's
`SchedulerStats`, in its free-form `kv_connector_stats`, the tokens still to
compute of every request that the frontend cannot know by itself: those in the
middle of a chunked prefill, and those preempted. Not a public interface of
vLLM, hence pinned to its version and covered by a test against the real engine.
"""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request, RequestStatus

PENDING = "headway_pending_prefill"


class _ReportsPendingPrefill:
    """Mixin: adds `{request id: tokens to compute}` under `PENDING`."""

    running: list[Request]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._preempted: dict[str, Request] = {}

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]
        self._preempted[request.request_id] = request

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)  # type: ignore[misc]
        if stats is None:
            return None
        # A decoding request has exactly its newest token left to compute; that
        # is decode. One without any output yet is still in prefill, however
        # little is left (nothing, once async scheduling has it all in flight).
        pending = {
            request.request_id: max(0, request.num_tokens - request.num_computed_tokens)
            for request in self.running
            if not request.num_output_tokens or request.num_tokens - request.num_computed_tokens > 1
        }
        for request_id, request in list(self._preempted.items()):
            if request.status == RequestStatus.PREEMPTED:
                pending[request_id] = request.num_tokens - request.num_computed_tokens
            else:
                del self._preempted[request_id]
        stats.kv_connector_stats = {**(stats.kv_connector_stats or {}), PENDING: pending}
        return stats


class HeadwayScheduler(_ReportsPendingPrefill, Scheduler):
    """For engines without async scheduling (CPU)."""


class HeadwayAsyncScheduler(_ReportsPendingPrefill, AsyncScheduler):
    """For engines with async scheduling (CUDA). Never run on a GPU yet."""
