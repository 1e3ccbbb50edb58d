"""The engine model beside vLLM's own scheduler: the same requests, step by step the same tokens."""

import random
from pathlib import Path

import pytest

from router.simulation.engine.model import EngineModel
from router.simulation.engine.sequence import Job
from serving.planning.bundled_model import prepare_bundled_model
from tests.router.simulation.checked_engine import job_ids
from tests.support.vllm_scheduler import BLOCK, VllmScheduler, make_profile

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


def step(engine: EngineModel, now_s: float) -> tuple[dict[str, int], int, float]:
    """The same of the engine model."""
    duration_s = engine.begin_step(now_s)
    if duration_s is None:
        return {}, engine.scheduler.kv.num_free, now_s
    scheduled = {sequence.id: num for sequence, num in engine.scheduler.prefills.items()}
    for sequence in engine.scheduler.running:
        if sequence.state.name == "DECODE":
            scheduled[sequence.id] = 1
    num_free = engine.scheduler.kv.num_free
    engine.end_step(now_s + duration_s)
    return scheduled, num_free, now_s + duration_s


@pytest.fixture(scope="module")
def model() -> Path:
    return prepare_bundled_model()


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
        while number < 60 or job_ids(ours):
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
            if rng.random() < 0.02 and (ids := job_ids(ours)):
                gone = rng.choice(ids)
                theirs.abort(gone)
                ours.abort(gone)
            expected = theirs.step()
            *found, now_s = step(ours, now_s)
            assert tuple(found) == expected, f"seed {seed} at {now_s}"
        num_preemptions += ours.num_preemptions_total
        num_hits += ours.scheduler.num_prefix_hits_total
    assert num_hits > 0
    if num_blocks == 18:
        assert num_preemptions > 0
