"""The engine model beside vLLM's own scheduler: the same requests, step by step the same tokens."""

import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine_model import EngineModel
from benchmarks.profile import Profile
from benchmarks.sequence import Job
from serving.onboard import onboard_model

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

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

    def __init__(self, model: Path, profile: Profile, priority: bool) -> None:
        import torch
        from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
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
            long_prefill_token_threshold=profile.prefill_chunk,
            enable_chunked_prefill=True,
            async_scheduling=False,
            policy="priority" if priority else "fcfs",
            is_encoder_decoder=False,
        )
        cache_config = CacheConfig(block_size=BLOCK, enable_prefix_caching=True)
        config = VllmConfig(
            model_config=model_config, scheduler_config=scheduler_config, cache_config=cache_config
        )
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
        self.scheduler = Scheduler(
            vllm_config=config,
            kv_cache_config=kv_cache_config,
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
            log_stats=True,
        )
        self._rng = random.Random(1)
        self._num_added = 0

    def add(self, job: Job, prompt: list[int]) -> None:
        from vllm import SamplingParams
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
            block_hasher=self._hasher,
        )
        self.scheduler.add_request(request)

    def abort(self, job_id: str) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests([f"{job_id}/0"], RequestStatus.FINISHED_ABORTED)

    def step(self) -> tuple[dict[str, int], int]:
        """Tokens per request in this step, and the free blocks after scheduling it."""
        from vllm.v1.outputs import ModelRunnerOutput

        output = self.scheduler.schedule()
        scheduled = dict(output.num_scheduled_tokens)
        num_free = self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        ids = list(scheduled)
        sampled = []
        for id_ in ids:
            request = self.scheduler.requests[id_]
            done = request.num_computed_tokens >= request.num_tokens
            sampled.append([self._rng.randrange(10**6, 10**9)] if done else [])
        self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={id_: index for index, id_ in enumerate(ids)},
                sampled_token_ids=sampled,
            ),
        )
        return scheduled, num_free


def step(engine: EngineModel, now_s: float) -> tuple[dict[str, int], int, float]:
    """The same of the engine model."""
    duration_s = engine.begin_step(now_s)
    if duration_s is None:
        return {}, engine.kv.num_free, now_s
    scheduled = {sequence.id: num for sequence, num in engine._prefills.items()}
    for sequence in engine._running:
        if sequence.state.name == "DECODE":
            scheduled[sequence.id] = 1
    num_free = engine.kv.num_free
    engine.end_step(now_s + duration_s)
    return scheduled, num_free, now_s + duration_s


@pytest.fixture(scope="module")
def model() -> Path:
    return onboard_model()


@pytest.mark.parametrize("priority", [False, True])
@pytest.mark.parametrize("chunk", [0, 24])
@pytest.mark.parametrize("num_blocks", [18, 40, 200])
def test_the_very_same_steps(model: Path, priority: bool, chunk: int, num_blocks: int) -> None:
    """Shared prefixes, preemptions, aborts, evictions: 10 random workloads of 60 requests each."""
    num_preemptions = num_hits = 0
    for seed in range(10):
        rng = random.Random(f"{seed} {priority} {chunk} {num_blocks}")
        profile = make_profile(max_prefill_chunk=chunk, num_kv_tokens=num_blocks * BLOCK)
        theirs = VllmScheduler(model, profile, priority)
        ours = EngineModel(profile, random.Random(0), priority=priority)
        now_s, number = 0.0, 0
        while number < 60 or list(ours.job_ids()):
            while number < 60 and rng.random() < 0.3:
                prefix = [rng.choice((1, 2)) for _ in range(rng.randrange(0, 4))]
                prompt = [id_ for id_ in prefix for _ in range(2 * BLOCK)]
                shared = len(prompt)
                own = rng.randrange(1, 60)
                prompt += [10_000 + 1000 * number + index for index in range(own)]
                hashes = tuple(
                    hash((tuple(prompt[: end + BLOCK]), "block"))
                    for end in range(0, len(prompt) - BLOCK + 1, BLOCK)
                )
                assert shared <= len(prompt)
                job = Job(str(number), len(prompt), rng.randrange(1, 50), rng.randrange(3), hashes)
                theirs.add(job, prompt)
                ours.add(job)
                number += 1
            if rng.random() < 0.02 and (ids := list(ours.job_ids())):
                gone = rng.choice(ids)
                theirs.abort(gone)
                ours.abort(gone)
            expected = theirs.step()
            *found, now_s = step(ours, now_s)
            assert tuple(found) == expected, f"seed {seed} at {now_s}"
        num_preemptions += ours.num_preemptions_total
        num_hits += ours.num_prefix_hits_total
    assert num_hits > 0
    if num_blocks == 18:
        assert num_preemptions > 0
