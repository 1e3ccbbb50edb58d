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
    size = 8 * BLOCK
    profile = make_profile(
        num_kv_tokens=size,
        max_model_len=size,
        max_num_batched_tokens=3 * BLOCK,
        max_prefill_chunk=2 * BLOCK,
    )
    engine = VllmScheduler(prepare_bundled_model(), profile, priority=True, kind=kind)
    engine.add(Job("long", 7 * BLOCK - 1, 1, priority=1), list(range(7 * BLOCK - 1)))
    assert engine.step()[0] == {"long/0": 3 * BLOCK}
    engine.add(Job("urgent", BLOCK, 3, priority=0), [10_000] * BLOCK)
    assert engine.step()[0] == {"long/0": 2 * BLOCK, "urgent/0": BLOCK}
    assert engine.step()[0] == {"urgent/0": 1}
    assert engine.num_preemptions == 1
    return engine


def test_a_chunk_that_is_withdrawn_leaves_the_prefix_cache() -> None:
    """What is computed of the long request once it goes on is all that is not in the cache."""
    from vllm.v1.core.sched.scheduler import Scheduler

    from serving.engine.vllm.scheduler import PreemptionFixMixin

    class Mended(PreemptionFixMixin, Scheduler):
        pass

    engine = withdraw_a_chunk(Mended)
    computed = []
    while engine.scheduler.has_unfinished_requests():
        computed.append(engine.step()[0].get("long/0", 0))
    assert sum(computed) == 2 * BLOCK - 1  # five blocks were computed the first time
    assert engine.num_wrong_tokens == 0


def test_vllm_still_caches_what_nobody_computed() -> None:
    """When this fails, vLLM's own preemption is mended: `PreemptionFixMixin` can go.

    Until then the long request, when it goes on, attends to two blocks that nobody has computed.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    engine = withdraw_a_chunk(Scheduler)
    while engine.scheduler.has_unfinished_requests():
        engine.step()
    assert engine.num_wrong_tokens > 0


class FixedBudget:
    """Lets every step prefill so many tokens."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def prefill_tokens(self, num_decode_reqs: int) -> int:
        return self._num_tokens

    def cut_after(self, num_left: list[int], num_prefill: int, num_decode_reqs: int) -> int:
        return 0  # never

    def learn(self, *step: float) -> None:
        pass


def test_a_long_prompt_shares_with_sooner_ones() -> None:
    """It takes all that a step may prefill, but of every two one is left to the sooner deadline."""
    from serving.engine.vllm.scheduler import HeadwayScheduler

    size = 40 * BLOCK
    profile = make_profile(
        num_kv_tokens=size, max_model_len=size, max_num_batched_tokens=10 * BLOCK
    )
    engine = VllmScheduler(prepare_bundled_model(), profile, priority=True, kind=HeadwayScheduler)
    engine.scheduler._budget = FixedBudget(4 * BLOCK)
    engine.add(Job("long", 10 * BLOCK, 1, priority=1), list(range(10 * BLOCK)))
    assert engine.step()[0] == {"long/0": 4 * BLOCK}
    engine.add(Job("sooner", BLOCK, 3, priority=0), [7] * BLOCK)
    assert engine.step()[0] == {"sooner/0": BLOCK}
    engine.add(Job("next", BLOCK, 1, priority=0), [9] * BLOCK)
    engine.add(Job("later", BLOCK, 1, priority=2), [8] * BLOCK)
    assert engine.step()[0] == {"sooner/0": 1, "long/0": 4 * BLOCK}
    assert engine.step()[0] == {
        "sooner/0": 1,
        "long/0": 2 * BLOCK,
        "next/0": BLOCK,
        "later/0": BLOCK,
    }


def test_a_prompt_whose_adapter_nobody_else_uses_gives_no_way() -> None:
    """Another's would be taken in its place, and the two together end vLLM's core."""
    from serving.engine.vllm.scheduler import ADAPTERS, HeadwayScheduler

    size = 40 * BLOCK
    profile = make_profile(
        num_kv_tokens=size, max_model_len=size, max_num_batched_tokens=10 * BLOCK
    )
    engine = VllmScheduler(
        prepare_bundled_model(), profile, priority=True, kind=HeadwayScheduler, max_loras=1
    )
    engine.scheduler._budget = FixedBudget(4 * BLOCK)
    engine.add(Job("long", 10 * BLOCK, 1, priority=1), list(range(10 * BLOCK)), adapter=1)
    assert engine.step()[0] == {"long/0": 4 * BLOCK}
    engine.add(Job("other", BLOCK, 1, priority=0), [7] * BLOCK, adapter=2)
    assert engine.step()[0] == {"long/0": 4 * BLOCK}
    engine.add(Job("same", BLOCK, 2, priority=0), [8] * BLOCK, adapter=1)
    assert engine.step()[0] == {"long/0": 2 * BLOCK, "same/0": BLOCK}
    engine.add(Job("base", 5 * BLOCK, 1, priority=2), list(range(5 * BLOCK)))
    assert engine.step()[0] == {"same/0": 1, "base/0": 4 * BLOCK}
    output = engine.schedule()
    assert "other/0" in output.num_scheduled_tokens
    assert engine.update(output).kv_connector_stats[ADAPTERS] == ["a2"]


def test_who_is_being_answered_always_gets_a_token() -> None:
    """Though two long prompts that came before want all that a step may prefill, and more."""
    from serving.engine.vllm.scheduler import HeadwayScheduler

    size = 40 * BLOCK
    profile = make_profile(
        num_kv_tokens=size, max_model_len=size, max_num_batched_tokens=10 * BLOCK
    )
    engine = VllmScheduler(prepare_bundled_model(), profile, priority=True, kind=HeadwayScheduler)
    engine.scheduler._budget = FixedBudget(4 * BLOCK)
    engine.add(Job("long", 10 * BLOCK, 1, priority=3), list(range(10 * BLOCK)))
    assert engine.step()[0] == {"long/0": 4 * BLOCK}
    engine.add(Job("second", 10 * BLOCK, 1, priority=2), list(range(1000, 1000 + 10 * BLOCK)))
    engine.add(Job("short", BLOCK, 3, priority=2), [7] * BLOCK)
    assert engine.step()[0] == {"second/0": 4 * BLOCK}  # it is due sooner
    assert engine.step()[0] == {"second/0": 4 * BLOCK}
    assert engine.step()[0] == {"second/0": 2 * BLOCK, "short/0": BLOCK}  # long gives way again
    assert engine.step()[0] == {"short/0": 1, "long/0": 4 * BLOCK}
    assert engine.step()[0] == {"short/0": 1, "long/0": 2 * BLOCK}


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
    profile = make_profile(num_kv_tokens=size, max_model_len=size)

    following: list[tuple[int, int] | None] = []
    pairs: list[float] = []

    def told(kind: type, num_ahead: int) -> list[dict[str, int]]:
        engine = VllmScheduler(prepare_bundled_model(), profile, priority=True, kind=kind)
        engine.scheduler._budget = FixedBudget(3 * BLOCK)
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
