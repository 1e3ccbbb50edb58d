"""What is different about engines that somebody else runs."""

import pytest

from router.types import Dispatch, Evacuate, Fail
from tests.support.builders import busy, fail_attempt, info, make_router, req, snapshot

THEIRS = {"heartbeat_s": 0.5, "is_external": True}


def test_a_hang_is_waited_for_longer():
    """What its steps may take is not known."""
    router = make_router(2, engine=THEIRS, hang_s=4.0)
    [first] = router.on_arrival(req("a"), 0.0)
    hung, other = first.replica_id, {"r0": "r1", "r1": "r0"}[first.replica_id]
    report = {"last_booking": 1, "num_inflight_reqs": 1}
    decisions, now_s = [], 0.0
    while not decisions:
        now_s += 0.5
        router.on_snapshot(other, snapshot(int(2 * now_s)), now_s)
        router.on_snapshot(hung, busy(int(2 * now_s), **report), now_s)
        decisions = router.on_tick(now_s)
    assert decisions == [Evacuate(hung, "hung")]
    assert 20.0 <= now_s <= 21.5


@pytest.mark.parametrize(("is_external", "num_suspects"), [(True, 0), (False, 1)])
def test_a_loss_accuses_nobody_at_first(is_external, num_suspects):
    """A server is stopped and started without our knowing; a second loss is one too many."""
    router = make_router(3, engine={**THEIRS, "is_external": is_external})
    [first] = router.on_arrival(req("a"), 0.0)
    router.on_replica_down(first.replica_id, 1.0)
    decisions = fail_attempt(router, "a", None, 1.0)
    assert router.state(1.0).suspects.num_suspects == num_suspects
    assert isinstance(decisions[0], Dispatch)
    if is_external:
        router.on_replica_down(decisions[0].replica_id, 2.0)
        fail_attempt(router, "a", None, 2.0)
        assert router.state(2.0).suspects.num_suspects == 1


@pytest.mark.parametrize("begun_externally", [True, False])
def test_a_reply_goes_on_where_its_record_is_understood(begun_externally):
    router = make_router(0)
    router.on_replica_up("theirs", info(is_external=True), 0.0)
    router.on_replica_up("ours", info(), 0.0)
    first, other = ("theirs", "ours") if begun_externally else ("ours", "theirs")
    router.on_replica_draining(other, 0.0)
    [dispatch] = router.on_arrival(req("a"), 0.0)
    assert dispatch.replica_id == first
    router.on_replica_draining(other, 0.0, is_draining=False)
    router.on_replica_down(first, 1.0)
    decisions = fail_attempt(router, "a", None, 1.0, has_begun=True, num_output_tokens=20)
    assert not any(isinstance(each, Dispatch | Fail) for each in decisions)  # held for one of its
    again = router.on_replica_up("another", info(is_external=begun_externally), 2.0)
    assert [each.replica_id for each in again if isinstance(each, Dispatch)] == ["another"]


def test_what_has_sent_nothing_goes_to_either():
    router = make_router(0)
    router.on_replica_up("theirs", info(is_external=True), 0.0)
    [dispatch] = router.on_arrival(req("a"), 0.0)
    assert dispatch.replica_id == "theirs"
    router.on_replica_up("ours", info(), 0.5)
    router.on_replica_down("theirs", 1.0)
    [again] = fail_attempt(router, "a", None, 1.0)
    assert again.replica_id == "ours"
