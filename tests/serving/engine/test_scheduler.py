"""Headway's scheduler inside of vLLM, over a KV cache that remembers what was written to it."""

import pytest

from router.simulation.engine.sequence import Job
from serving.planning.bundled_model import prepare_bundled_model
from tests.support.vllm_scheduler import BLOCK, VllmScheduler, make_profile

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


def withdraw_a_chunk(kind: type) -> VllmScheduler:
    """Return an engine in which an urgent request took a block from a long one's chunk.

    The chunk was in the same step already; the long request is still to be computed again.
    """
    size = 7 * BLOCK
    profile = make_profile(num_kv_tokens=size, max_model_len=size, max_prefill_chunk=3 * BLOCK)
    engine = VllmScheduler(prepare_bundled_model(), profile, priority=True, kind=kind)
    engine.add(Job("long", 7 * BLOCK - 1, 1, priority=1), list(range(7 * BLOCK - 1)))
    assert engine.step()[0] == {"long/0": 3 * BLOCK}
    engine.add(Job("urgent", BLOCK, 3, priority=0), [10_000] * BLOCK)
    assert engine.step()[0] == {"urgent/0": BLOCK}
    assert engine.step()[0] == {"urgent/0": 1}
    assert engine.num_preemptions == 1
    return engine


def test_a_chunk_that_is_withdrawn_leaves_the_prefix_cache() -> None:
    """What is computed of the long request once it goes on is all that is not in the cache."""
    from serving.engine.vllm.scheduler import HeadwayScheduler

    engine = withdraw_a_chunk(HeadwayScheduler)
    computed = []
    while engine.scheduler.has_unfinished_requests():
        computed.append(engine.step()[0].get("long/0", 0))
    assert sum(computed) == 4 * BLOCK - 1  # three blocks were computed the first time
    assert engine.num_wrong_tokens == 0


def test_vllm_still_caches_what_nobody_computed() -> None:
    """When this fails, vLLM's own preemption is mended: `PreemptionFixMixin` can go.

    Until then the long request, when it goes on, attends to two blocks that nobody has computed.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    from serving.engine.vllm.scheduler import PrefillCapMixin

    class Unmended(PrefillCapMixin, Scheduler):
        pass

    engine = withdraw_a_chunk(Unmended)
    while engine.scheduler.has_unfinished_requests():
        engine.step()
    assert engine.num_wrong_tokens > 0


def test_a_long_prompt_shares_with_sooner_ones() -> None:
    """Alone it takes its cap; of every two steps one is left to the sooner deadline."""
    from serving.engine.vllm.scheduler import HeadwayScheduler

    size = 40 * BLOCK
    profile = make_profile(num_kv_tokens=size, max_model_len=size, max_prefill_chunk=BLOCK)
    engine = VllmScheduler(prepare_bundled_model(), profile, priority=True, kind=HeadwayScheduler)
    engine.add(Job("long", 10 * BLOCK, 1, priority=1), list(range(10 * BLOCK)))
    assert engine.step()[0] == {"long/0": BLOCK}
    for name in ("a", "b"):
        engine.add(Job(name, BLOCK, 1, priority=0), [ord(name)] * BLOCK)
        assert engine.step()[0] == {f"{name}/0": BLOCK}
        engine.add(Job(f"{name}2", BLOCK, 1, priority=0), [2 * ord(name)] * BLOCK)
        assert engine.step()[0] == {f"{name}2/0": BLOCK, "long/0": BLOCK}
    engine.add(Job("later", BLOCK, 1, priority=2), [7] * BLOCK)
    assert engine.step()[0] == {"long/0": BLOCK, "later/0": BLOCK}


def test_with_async_scheduling_a_step_that_runs_is_pending_as_well() -> None:
    """The next step is made up before one ends; by the same measure as without, it is to come."""
    from serving.engine.vllm.scheduler import (
        NEXT,
        PAIRS,
        PENDING,
        HeadwayAsyncScheduler,
        HeadwayScheduler,
    )

    size = 20 * BLOCK
    profile = make_profile(num_kv_tokens=size, max_model_len=size, max_prefill_chunk=3 * BLOCK)

    following: list[tuple[int, int] | None] = []
    pairs: list[float] = []

    def told(kind: type, num_ahead: int) -> list[dict[str, int]]:
        engine = VllmScheduler(prepare_bundled_model(), profile, priority=True, kind=kind)
        engine.add(Job("long", 10 * BLOCK, 3), list(range(10 * BLOCK)))
        steps = [engine.schedule() for _ in range(num_ahead)]
        pending = []
        for _ in range(4):
            steps.append(engine.schedule())
            stats = engine.update(steps.pop(0))
            pending.append(stats.kv_connector_stats[PENDING])
            following.append(stats.kv_connector_stats.get(NEXT))
            pairs.append(stats.kv_connector_stats.get(PAIRS, 0.0))
        return pending

    alone = told(HeadwayScheduler, 0)
    assert [each.get("long/0", 0) for each in alone] == [7 * BLOCK, 4 * BLOCK, BLOCK, 0]
    assert told(HeadwayAsyncScheduler, 1)[:3] == alone[:3]
    # Three blocks attend to what is before them, three times, then the last one.
    of_a_prompt = [num / 2 * BLOCK**2 for num in (3 * 3, 3 * 9, 3 * 15, 1 * 19)]
    assert pairs == of_a_prompt * 2
    assert following[:4] == [None] * 4
    assert following[4:] == [(3 * BLOCK, 0), (3 * BLOCK, 0), (BLOCK, 0), (0, 1)]


def test_an_ended_request_tells_its_last_block_that_was_computed() -> None:
    """Of prompt and answer: the next turn begins with them. The last token was only generated."""
    from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

    from serving.engine.vllm.scheduler import ANSWERS, HeadwayScheduler

    size = 20 * BLOCK
    profile = make_profile(num_kv_tokens=size, max_model_len=size, max_prefill_chunk=0)
    engine = VllmScheduler(prepare_bundled_model(), profile, priority=True, kind=HeadwayScheduler)
    for number, num_output_tokens in enumerate((BLOCK, BLOCK + 1)):
        engine.add(Job(str(number), 2 * BLOCK, num_output_tokens), [number] * 2 * BLOCK)
        request = engine.scheduler.requests[f"{number}/0"]
        told: dict[str, int] = {}
        while engine.scheduler.has_unfinished_requests():
            stats = engine.update(engine.schedule())
            told |= stats.kv_connector_stats.get(ANSWERS, {})
        last = maybe_convert_block_hash(request.block_hashes[1 + number])
        assert told == {f"{number}/0": last}
