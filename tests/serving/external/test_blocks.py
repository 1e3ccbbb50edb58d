"""What a prefix cache is taken to hold."""

from router.fleet.prefix_cache import PrefixCache
from serving.engine.external.blocks import GuessedBlocks


def test_equal_beginnings_have_equal_hashes():
    blocks, others = GuessedBlocks(160, 16), GuessedBlocks(1600, 16)
    first = blocks.hashes(range(40))
    assert len(first) == 2
    assert others.hashes([*range(35), 7, 7])[:2] == first
    assert others.hashes([1, *range(1, 40)])[1] != first[1]  # it covers all before it
    assert blocks.hashes(range(15)) == []


def test_the_cache_follows_and_forgets_ends_first():
    blocks, cache = GuessedBlocks(64, 16), PrefixCache()
    old, new = blocks.hashes(range(48)), blocks.hashes(range(100, 132))
    for hashes in (old, new):
        assert cache.receive(blocks.use(hashes))
    assert [each in cache for each in old] == [True, True, False]
    assert [each in cache for each in new] == [True, True]
    assert len(cache) == len(blocks) == 4
    assert blocks.use(new) is None
    assert cache.receive(blocks.use(blocks.hashes(range(200, 216))))
    assert [each in cache for each in old] == [True, False, False]
