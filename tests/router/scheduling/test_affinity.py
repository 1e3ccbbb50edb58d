"""Conversations stay with the engine that holds them, by cost alone."""

import pytest

from router.core.router import Router
from router.fleet.admission import kv_need_tokens
from router.types import BlockUpdate, Usage
from tests.support.builders import fail_attempt, make_router, req, snapshot

BLOCKS = list(range(40))  # 640 tokens


def turn(name: str, num_texts: int):
    return req(
        name,
        64 * num_texts,
        prefix_hashes=tuple(range(num_texts)),
        prefix_block_share=1 / num_texts,
    )


def conversation(seed: int, **settings) -> tuple[Router, str, str]:
    """A router of two idle engines, the one that holds a first turn, and the other."""
    router = make_router(2, engine={"max_num_batched_tokens": 8192}, seed=seed, **settings)
    [dispatch] = router.on_arrival(turn("first", 10), 0.0)
    home = dispatch.replica_id
    router.on_prompt("first", home, 640, BLOCKS)
    assert router.on_blocks(home, BlockUpdate(since=0, until=40, stored=BLOCKS))
    router.on_finish("first", Usage(num_output_tokens=10), 1.0)
    for replica_id in ("r0", "r1"):
        router.on_snapshot(replica_id, snapshot(1, last_booking=1), 1.0)
    return router, home, "r1" if home == "r0" else "r0"


@pytest.mark.parametrize("seed", range(10))
def test_the_second_turn_goes_where_the_first_was(seed):
    router, home, _ = conversation(seed)
    [dispatch] = router.on_arrival(turn("second", 12), 2.0)
    assert (dispatch.replica_id, dispatch.num_cached_tokens) == (home, 640)


@pytest.mark.parametrize("seed", range(10))
def test_it_goes_elsewhere_when_that_engine_is_far_busier(seed):
    """And is replicated by that: then both hold it."""
    router, home, other = conversation(seed)
    pending = snapshot(2, num_pending_prefill_tokens=6000, num_waiting_reqs=1)
    router.on_snapshot(home, pending, 2.0)
    [dispatch] = router.on_arrival(turn("second", 12), 2.0)
    assert (dispatch.replica_id, dispatch.num_cached_tokens) == (other, 0)
    router.on_blocks(other, BlockUpdate(since=0, until=40, stored=BLOCKS))
    router.on_finish("second", None, 3.0)
    [again] = router.on_arrival(turn("third", 12), 3.0)
    assert (again.replica_id, again.num_cached_tokens) == (other, 640)


def test_what_was_generated_makes_no_more_of_a_prompt_cached():
    """A reply that breaks off grows the prompt; the text in front of it is as long as before."""
    router = make_router(engine={"max_num_batched_tokens": 8192})
    router.on_arrival(turn("first", 10), 0.0)
    [dispatch] = router.on_arrival(turn("second", 12), 0.0)
    assert dispatch.num_cached_tokens == 640
    [again] = fail_attempt(router, "second", None, 1.0, num_output_tokens=100)
    assert again.num_cached_tokens == 640
    # What its engine then tells is the whole, in which that text is so much less.
    router.on_prompt("second", "r0", 868, list(range(54)))
    router.on_blocks("r0", BlockUpdate(since=0, until=54, stored=list(range(54))))
    router.on_prompt("first", "r0", 640, BLOCKS)
    [third] = router.on_arrival(turn("third", 14), 2.0)
    assert third.num_cached_tokens == 768


def test_what_others_use_of_a_prompt_is_taken_off_once():
    """It needs no room, and what it makes the cache grow by is what was not cached, not less."""
    router = make_router(engine={"max_num_batched_tokens": 512})
    blocks = list(range(640))
    router.on_arrival(turn("first", 160), 0.0)
    router.on_prompt("first", "r0", 10_240, blocks)
    router.on_blocks("r0", BlockUpdate(since=0, until=640, stored=blocks))
    router.on_snapshot("r0", snapshot(1, last_booking=1), 1.0)
    ledger = router._fleet.get("r0").ledger
    first = ledger.num_acknowledged_own_kv_tokens
    second = turn("second", 164)
    [dispatch] = router.on_arrival(second, 2.0)
    assert dispatch.num_cached_tokens == 10_240
    assert 0 < ledger.num_kv_tokens < kv_need_tokens(second) - 10_000
    router.on_snapshot("r0", snapshot(2, last_booking=2), 3.0)
    own = ledger.num_acknowledged_own_kv_tokens - first
    assert own == kv_need_tokens(second) - 10_240
    assert own > 256


def test_without_the_prefix_it_goes_anywhere():
    chosen = set()
    for seed in range(20):
        router, home, _ = conversation(seed, ablate=["prefix"])
        [dispatch] = router.on_arrival(turn("second", 12), 2.0)
        assert dispatch.num_cached_tokens == 0
        chosen.add(dispatch.replica_id == home)
    assert chosen == {True, False}
