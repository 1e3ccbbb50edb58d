"""One of vLLM's schedulers by itself, with a model runner that makes up tokens."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from router.simulation.engine.profile import Profile
from router.simulation.engine.sequence import Job
from serving.engine.vllm.patches import set_itl_target

BLOCK = 16


def make_profile(**changes: Any) -> Profile:
    defaults: dict[str, Any] = {
        "name": "test",
        "model": "none",
        "device": "none",
        "source": "made up",
        "max_model_len": 256,
        "max_num_seqs": 6,
        "max_num_batched_tokens": 64,
        "max_prefill_chunk": 0,
        "num_kv_tokens": 20 * BLOCK,
        "block_size": BLOCK,
        "base_s": 0.01,
        "s_per_token": 0.001,
    }
    return Profile(**(defaults | changes))


class VllmScheduler:
    """vLLM's scheduler, and a model runner that makes up tokens."""

    def __init__(
        self,
        model: Path,
        profile: Profile,
        priority: bool,
        kind: type | None = None,
        itl_target_s: float | None = None,
        max_loras: int = 0,
    ) -> None:
        import torch
        from vllm.config import (
            CacheConfig,
            LoRAConfig,
            ModelConfig,
            SchedulerConfig,
            VllmConfig,
        )
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        model_config = ModelConfig(
            model=str(model), max_model_len=profile.max_model_len, dtype="bfloat16", seed=0
        )
        scheduler_config = SchedulerConfig(
            max_num_seqs=profile.max_num_seqs,
            max_num_batched_tokens=profile.max_num_batched_tokens,
            max_model_len=profile.max_model_len,
            long_prefill_token_threshold=profile.max_prefill_chunk,
            enable_chunked_prefill=True,
            async_scheduling=False,
            policy="priority" if priority else "fcfs",
            is_encoder_decoder=False,
        )
        cache_config = CacheConfig(block_size=BLOCK, enable_prefix_caching=True)
        config = VllmConfig(
            model_config=model_config,
            scheduler_config=scheduler_config,
            cache_config=cache_config,
            lora_config=LoRAConfig(max_loras=max_loras) if max_loras else None,
        )
        set_itl_target(config, itl_target_s)
        num_blocks = profile.num_kv_blocks + 1  # one is vLLM's own
        config.cache_config.num_gpu_blocks = num_blocks
        spec = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.bfloat16
        )
        kv_cache_config = KVCacheConfig(
            num_blocks=num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        )
        self.scheduler = (kind or Scheduler)(
            vllm_config=config,
            kv_cache_config=kv_cache_config,
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
            log_stats=True,
        )
        self._rng = random.Random(1)
        self._samples: list[list[bool]] = []  # of steps not ended: whose prompt is whole then
        # What each slot of the KV cache holds: the tokens up to this one, as a number.
        self._kv: dict[tuple[int, int], int] = {}
        self.num_wrong_tokens = self.num_preemptions = self.num_hits = 0
        self._num_added = 0

    def add(self, job: Job, prompt: list[int], adapter: int = 0) -> None:
        """Add a request, for an adapter of this number; 0: for none."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest
        from vllm.v1.request import Request

        params = SamplingParams(max_tokens=job.num_output_tokens, ignore_eos=True)
        params.update_from_generation_config({}, None)
        self._num_added += 1
        request = Request(
            request_id=f"{job.id}/0",
            prompt_token_ids=prompt,
            sampling_params=params,
            pooling_params=None,
            arrival_time=float(self._num_added),
            priority=job.priority,
            lora_request=LoRARequest(f"a{adapter}", adapter, "/a") if adapter else None,
            block_hasher=self._hasher,
        )
        self.scheduler.add_request(request)

    def abort(self, job_id: str) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests([f"{job_id}/0"], RequestStatus.FINISHED_ABORTED)

    def step(self, compute: Callable[[], None] = lambda: None) -> tuple[dict[str, int], int]:
        """Tokens per request in this step, and the free blocks after scheduling it.

        `compute()` is called while the step runs.
        """
        output = self.schedule()
        num_free = self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        compute()
        self.update(output)
        return dict(output.num_scheduled_tokens), num_free

    def schedule(self) -> Any:
        """Make up a step, vLLM's `SchedulerOutput`, and compute it."""
        output = self.scheduler.schedule()
        self.num_preemptions += len(output.preempted_req_ids or ())
        self.num_hits += sum(each.num_computed_tokens for each in output.scheduled_new_reqs)
        self._compute(output.num_scheduled_tokens)
        requests = map(self.scheduler.requests.get, output.num_scheduled_tokens)
        self._samples.append([each.num_computed_tokens >= each.num_tokens for each in requests])
        return output

    def update(self, output: Any) -> Any:
        """Tell of the end of the oldest step that has not ended; vLLM's `SchedulerStats` of it."""
        from vllm.v1.outputs import ModelRunnerOutput

        ids = list(output.num_scheduled_tokens)
        sampled = [
            [self._rng.randrange(10**6, 10**9)] if is_whole else []
            for is_whole in self._samples.pop(0)
        ]
        outputs = self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={id_: index for index, id_ in enumerate(ids)},
                sampled_token_ids=sampled,
            ),
        )
        return next(iter(outputs.values())).scheduler_stats

    def _compute(self, scheduled: dict[str, int]) -> None:
        """Write the KV cache as a step does; count tokens attended to that are others' or void."""
        reads: dict[tuple[int, int], int] = {}
        for id_, num_tokens in scheduled.items():
            request = self.scheduler.requests[id_]
            [blocks] = self.scheduler.kv_cache_manager.get_block_ids(id_)
            first_new = request.num_computed_tokens - num_tokens
            prefix = 0
            for position, token in enumerate(request.all_token_ids[: request.num_computed_tokens]):
                prefix = hash((prefix, token))
                slot = blocks[position // BLOCK], position % BLOCK
                # All of a step's writes come before its reads: attention is layer by layer.
                if position >= first_new:
                    self._kv[slot] = prefix
                reads[slot] = prefix
        self.num_wrong_tokens += sum(self._kv.get(slot) != prefix for slot, prefix in reads.items())
