import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.simulation.engine.kv_cache import BlockTable, KvCache


def fill(kv: KvCache, block_table: BlockTable, num_blocks: int) -> int:
    """Adopt the table's hits, allocate the rest of its blocks, all full; return the hits."""
    hit = kv.look_up(block_table, num_blocks)
    kv.adopt(block_table, hit)
    kv.extend(block_table, num_blocks - hit.num_blocks)
    kv.commit(block_table, num_blocks)
    return hit.num_blocks


def test_a_prefix_is_shared_while_it_runs_and_found_after() -> None:
    kv = KvCache(10)
    first, second, third = BlockTable([1, 2, 3]), BlockTable([1, 2, 4]), BlockTable([1, 9])
    assert fill(kv, first, 4) == 0
    assert fill(kv, second, 4) == 2
    assert (kv.num_used, kv.num_free) == (6, 4)
    kv.release(first, 4)
    assert (kv.num_used, kv.num_cached, kv.num_blank) == (4, 2, 4)
    kv.release(second, 3)  # its last block is not full
    assert (kv.num_used, kv.num_cached, kv.num_blank) == (0, 5, 5)
    assert fill(kv, third, 2) == 1


def test_blanks_first_then_the_least_recently_used_tail_before_head() -> None:
    kv = KvCache(6)
    old, young = BlockTable([1, 2]), BlockTable([3, 4])
    for block_table in (old, young):
        fill(kv, block_table, 2)
        kv.release(block_table, 2)
    kv.allocate_blocks(3)  # two blanks and block 2
    assert kv.look_up(BlockTable([1, 2]), 9).num_blocks == 1
    assert kv.look_up(BlockTable([3, 4]), 9).num_blocks == 2
    kv.allocate_blocks(2)  # blocks 1 and 4
    assert kv.look_up(BlockTable([1, 2]), 9).num_blocks == 0
    assert kv.look_up(BlockTable([3, 4]), 9).num_blocks == 1


def test_a_hit_makes_it_young_again() -> None:
    kv = KvCache(4)
    for keys in ([1, 2], [3, 4], [1, 2]):
        block_table = BlockTable(keys)
        fill(kv, block_table, 2)
        kv.release(block_table, 2)
    kv.allocate_blocks(2)
    assert kv.look_up(BlockTable([1, 2]), 9).num_blocks == 2


def test_the_same_block_computed_twice_is_found_until_both_are_gone() -> None:
    kv = KvCache(4)
    first, second = BlockTable([1]), BlockTable([1])
    for block_table in (first, second):  # neither sees the other: both before any commit
        kv.extend(block_table, 1)
    for block_table in (first, second):
        kv.commit(block_table, 1)
        kv.release(block_table, 1)
    kv.allocate_blocks(3)
    assert kv.look_up(BlockTable([1]), 9).num_blocks == 1
    kv.allocate_blocks(1)
    assert kv.look_up(BlockTable([1]), 9).num_blocks == 0


def test_its_own_blocks_are_found_again_and_only_by_itself() -> None:
    kv = KvCache(10)
    block_table = BlockTable([1])
    fill(kv, block_table, 5)
    kv.release(block_table, 4)
    assert kv.look_up(BlockTable([1]), 9).num_blocks == 1
    kv.allocate_blocks(8)  # six blanks, then two of the private blocks, from the end
    hit = kv.look_up(block_table, 9)
    assert (hit.num_blocks, hit.num_evictable) == (2, 2)
    kv.adopt(block_table, hit)
    assert (kv.num_used, kv.num_cached, kv.num_blank) == (10, 0, 0)


def test_segments_of_several_blocks() -> None:
    kv = KvCache(12, segment_blocks=4)
    block_table = BlockTable([1, 2])
    fill(kv, block_table, 7)
    assert kv.look_up(BlockTable([1, 2]), 9).num_blocks == 4  # the second is not whole
    kv.release(block_table, 7)
    assert (kv.num_cached, kv.num_blank) == (7, 5)
    kv.allocate_blocks(9)  # blanks, three private blocks, and with one of it the segment
    assert (kv.num_used, kv.num_cached, kv.num_blank) == (9, 0, 3)
    assert kv.look_up(BlockTable([1, 2]), 9).num_blocks == 0


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.lists(st.integers(0, 3), max_size=5), st.integers(0, 3)),
        max_size=40,
    ),
    st.sampled_from([1, 3]),
)
def test_every_block_is_counted_once(steps: list, size: int) -> None:
    """Tables are filled, grow and are freed, some again after a preemption; no block is lost."""
    kv = KvCache(30, size)
    block_tables: dict[int, tuple[BlockTable, int]] = {}
    gone: dict[int, BlockTable] = {}
    for slot, branch, num_extra in steps:
        if slot in block_tables:
            block_table, num_blocks = block_tables.pop(slot)
            kv.release(block_table, max(0, num_blocks - (num_extra > 1)))
            gone[slot] = block_table
        else:
            keys = [tuple(branch[: end + 1]) for end in range(len(branch))]
            block_table = gone.pop(slot) if num_extra == 3 and slot in gone else BlockTable(keys)
            wanted = len(block_table.keys) * size + num_extra
            hit = kv.look_up(block_table, wanted)
            if wanted - hit.num_blocks + hit.num_evictable > kv.num_free:
                continue
            kv.adopt(block_table, hit)
            kv.extend(block_table, wanted - hit.num_blocks)
            kv.commit(block_table, wanted)
            block_tables[slot] = block_table, wanted
        shared = {
            segment for block_table, _ in block_tables.values() for segment in block_table.shared
        }
        held = sum(segment.num_blocks for segment in shared)
        held += sum(block_table.num_private for block_table, _ in block_tables.values())
        assert kv.num_used == held
        assert kv.num_blank >= 0
        assert kv.num_cached == sum(segment.num_blocks for segment in kv._lru)
        assert all(segment.num_refs == 0 for segment in kv._lru)
        for block_table, wanted in block_tables.values():
            assert kv.num_held(block_table) == wanted
    for block_table, num_blocks in block_tables.values():
        kv.release(block_table, num_blocks)
    assert kv.num_used == 0
    kv.allocate_blocks(30)
    assert not kv._found
    assert not kv._twins


def test_nothing_is_taken_that_is_not_free() -> None:
    kv = KvCache(2)
    with pytest.raises(StopIteration):
        kv.allocate_blocks(3)
