"""Whoever follows the log knows what the cache holds, however seldom they look."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.fleet import block_log
from router.fleet.block_log import BlockLog
from router.types import BlockUpdate

BLOCKS = st.lists(st.integers(0, 9), max_size=6)
CHANGES = st.one_of(
    st.tuples(st.just("store"), BLOCKS),
    st.tuples(st.just("remove"), BLOCKS),
    st.tuples(st.just("clear"), st.none()),
    st.tuples(st.just("look"), st.integers(0, 2)),  # who looks
    st.tuples(st.just("forget"), st.integers(0, 2)),  # asks for all anew
)


class Follower:
    """Knows what it was told, as a gateway does."""

    def __init__(self) -> None:
        self.position = 0
        self.held: set[int] = set()

    def look(self, log: BlockLog) -> BlockUpdate | None:
        update = log.since(self.position)
        if update is not None:
            if update.since < 0:
                self.held = set()
            else:
                assert update.since == self.position
            assert not set(update.stored) & set(update.removed)
            self.held = (self.held | set(update.stored)) - set(update.removed)
            self.position = update.until
        return update


def test_nothing_has_happened():
    log = BlockLog()
    assert log.position == 0
    assert log.since(0) is None


def test_only_what_is_new_is_told():
    log, follower = BlockLog(), Follower()
    log.store([1, 2])
    follower.look(log)
    log.store([3])
    log.remove([1])
    assert follower.look(log) == BlockUpdate(since=2, until=4, stored=[3], removed=[1])
    assert follower.look(log) is None
    assert follower.held == {2, 3}


def test_a_block_that_came_and_went_is_told_as_gone():
    log = BlockLog()
    log.store([1])
    log.remove([1])
    assert log.since(0) == BlockUpdate(since=0, until=2, stored=[], removed=[1])


def test_who_knows_nothing_is_told_everything():
    log = BlockLog()
    assert log.since(-1) == BlockUpdate(since=-1, until=0)
    log.store([1, 2])
    log.remove([1])
    assert log.since(-1) == BlockUpdate(since=-1, until=3, stored=[2])


def test_after_a_clear_everything_is_told_anew():
    log, follower = BlockLog(), Follower()
    log.store([1, 2])
    follower.look(log)
    log.clear()
    log.store([3])
    assert follower.look(log) == BlockUpdate(since=-1, until=4, stored=[3])
    log.store([4])
    assert follower.look(log).since == 4  # and from there on what is new


def test_the_log_is_bounded_and_who_lags_is_told_everything():
    log, follower = BlockLog(), Follower()
    log.store(range(block_log._MAX_CHANGES))
    assert log.since(0).since == 0
    log.remove([0])
    update = follower.look(log)
    assert (update.since, len(update.stored)) == (-1, block_log._MAX_CHANGES - 1)
    assert len(log._changes) == block_log._MAX_CHANGES


@pytest.mark.parametrize("max_changes", [1, 5, 4096])
@given(changes=st.lists(CHANGES, max_size=40))
def test_followers_end_with_what_is_held(max_changes, changes):
    """From any position, across clears and a log that is too short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_log, "_MAX_CHANGES", max_changes)
        log = BlockLog()
    copies: Counter[int] = Counter()
    followers = [Follower() for _ in range(3)]
    for what, argument in changes:
        if what == "store":
            log.store(argument)
            copies.update(argument)
        elif what == "remove":
            log.remove(argument)
            copies -= Counter(argument)
        elif what == "clear":
            log.clear()
            copies.clear()
        elif what == "look":
            followers[argument].look(log)
            assert followers[argument].held == set(copies)
        else:
            followers[argument].position = -1
    for follower in followers:
        follower.look(log)
        assert follower.held == set(copies)
        assert follower.position == log.position


def test_a_block_is_held_until_its_last_copy_goes():
    log, follower = BlockLog(), Follower()
    log.store([1, 1])
    log.remove([1])
    follower.look(log)
    assert follower.held == {1}
    log.remove([1])
    follower.look(log)
    assert follower.held == set()
