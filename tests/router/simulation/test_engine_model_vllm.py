"""The engine model beside vLLM's own scheduler: the same requests, step by step the same tokens."""

import random
from functools import partial
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


class Clock:
    """Stands for the `time` of Headway's scheduler."""

    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.mark.parametrize("priority", [False, True])
@pytest.mark.parametrize("num_blocks", [18, 40, 200])
@pytest.mark.parametrize(("chunk", "itl_target_s"), [(0, None), (24, None), (0, 0.0377)])
def test_the_very_same_steps(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    priority: bool,
    chunk: int,
    num_blocks: int,
    itl_target_s: float | None,
) -> None:
    """Shared prefixes, preemptions, aborts, evictions: 10 random workloads of 60 requests each.

    Of vLLM's own scheduler, or of Headway's, which by the times of steps gives each a budget.
    """
    from serving.engine.vllm import scheduler

    clock = Clock()
    monkeypatch.setattr(scheduler, "time", clock)
    num_preemptions = num_hits = num_limited = 0
    for seed in range(10 if itl_target_s is None else 5):
        rng = random.Random(f"{seed} {priority} {chunk} {num_blocks}")
        profile = make_profile(
            max_prefill_chunk=chunk,
            num_kv_tokens=num_blocks * BLOCK,
            base_s=0.0063,  # five times that, and what it leaves of the target, are no whole tokens
        )
        kind = None if itl_target_s is None else scheduler.HeadwayScheduler
        theirs = VllmScheduler(model, profile, priority, kind, itl_target_s)
        ours = EngineModel(profile, random.Random(0), priority=priority, itl_target_s=itl_target_s)
        now_s, number = 0.0, 0
        clock.now_s = 0.0
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
            *found, now_s = step(ours, now_s)
            expected = theirs.step(partial(setattr, clock, "now_s", now_s))
            assert tuple(found) == expected, f"seed {seed} at {now_s}"
            num_limited += sum(num for num in expected[0].values() if num > 1) in (30, 31)
        num_preemptions += ours.num_preemptions_total
        num_hits += ours.scheduler.num_prefix_hits_total
    assert num_hits > 0
    if itl_target_s is not None:
        assert num_limited > 0  # 31.4 ms are left for prefill
    if num_blocks == 18:
        assert num_preemptions > 0
