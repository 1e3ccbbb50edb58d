from hypothesis import given
from hypothesis import strategies as st

from router.types import BlockUpdate
from tests.support.builders import make_replica, req


def known(num_tokens: int, blocks: tuple[int, ...]):
    """A prompt of which these blocks of 16 tokens are known."""
    ends = tuple(16 * (number + 1) for number in range(len(blocks)))
    return req("a", num_tokens, block_hashes=blocks, block_ends=ends)


@given(
    num_held=st.integers(0, 20), num_known=st.integers(0, 20), others=st.sets(st.integers(100, 999))
)
def test_cached_tokens_are_those_of_the_longest_held_prefix(num_held, num_known, others):
    replica = make_replica()
    stored = [*range(num_held), *others]
    assert replica.prefix_cache.receive(BlockUpdate(since=0, until=len(stored), stored=stored))
    request = known(1000, tuple(range(num_known)))
    assert replica.prefix_cache.num_tokens(request) == 16 * min(num_held, num_known)
    assert replica.num_new_tokens(request) == 1000 - 16 * min(num_held, num_known)


def test_after_a_missed_update_nothing_is_cached_until_all_is_told():
    replica, request = make_replica(), known(1000, (1, 2, 3))
    assert replica.prefix_cache.receive(BlockUpdate(since=0, until=2, stored=[1, 2]))
    assert replica.prefix_cache.num_tokens(request) == 32
    assert not replica.prefix_cache.receive(BlockUpdate(since=5, until=6, stored=[3]))
    assert replica.prefix_cache.num_tokens(request) == 0
    assert replica.prefix_cache.receive(BlockUpdate(since=-1, until=6, stored=[1, 2, 3]))
    assert replica.prefix_cache.num_tokens(request) == 48
    assert replica.prefix_cache.receive(BlockUpdate(since=6, until=7, removed=[3]))
    assert replica.prefix_cache.num_tokens(request) == 32


def test_what_is_cached_never_passes_the_prompt():
    """The size of a prompt may be estimated below what is known of its blocks."""
    replica = make_replica()
    replica.prefix_cache.receive(BlockUpdate(since=-1, until=9, stored=list(range(9))))
    request = known(100, tuple(range(9)))
    assert replica.prefix_cache.num_tokens(request) == 99
    assert replica.num_new_tokens(request) == 1


def test_after_a_gap_only_a_whole_update_counts():
    replica = make_replica()
    assert replica.prefix_cache.receive(BlockUpdate(since=0, until=1, stored=[1]))
    assert not replica.prefix_cache.receive(BlockUpdate(since=2, until=3, stored=[3]))
    assert not replica.prefix_cache.receive(BlockUpdate(since=1, until=2, stored=[2]))
    assert replica.prefix_cache.num_tokens(known(100, (1, 2, 3))) == 0
    assert replica.prefix_cache.receive(BlockUpdate(since=-1, until=3, stored=[1, 2, 3]))
    assert replica.prefix_cache.num_tokens(known(100, (1, 2, 3))) == 48


def test_what_is_on_its_way_counts_until_it_is_told_or_never_will_be():
    replica = make_replica()
    first = req("a", 100, prefix_hashes=(1, 2), prefix_block_share=0.4)
    second = req("b", 100, prefix_hashes=(1, 3), prefix_block_share=0.4)
    replica.prefix_cache.expect_prompt(first)
    replica.prefix_cache.expect_prompt(second)
    assert replica.prefix_cache.num_tokens(second) == 80
    replica.prefix_cache.confirm_prompt(second)
    assert replica.prefix_cache.num_tokens(second) == 40
    replica.prefix_cache.confirm_prompt(first)
    assert replica.prefix_cache.num_tokens(first) == 0
