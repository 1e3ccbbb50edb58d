import pytest

from router.fleet.fleet import Fleet
from tests.support.builders import make_replica, req, snapshot, stepped


def ids(replicas) -> list[str]:
    return [replica.id for replica in replicas]


def accepting(fleet: Fleet, model: str = "m") -> list[str]:
    """Those that should be sent any request now and have room for one."""
    return ids(fleet.with_room(req("new", model=model), 1, short=False))


def test_found_by_each_of_its_names():
    fleet = Fleet()
    fleet.add(make_replica("r0"))
    fleet.add(make_replica("r1", aliases=("lora",)))
    assert accepting(fleet) == ["r0", "r1"]
    assert accepting(fleet, "lora") == ["r1"]
    assert accepting(fleet, "other") == []


def test_found_by_the_names_it_has_now():
    """Adapters come and go; what no engine serves any more is not known either."""
    fleet = Fleet()
    replicas = [make_replica(f"r{index}", max_loras=1) for index in range(3)]
    for replica in replicas:
        fleet.add(replica)
    for number, replica in enumerate(replicas[:2]):
        replica.receive(snapshot(1, adapter_paths={"a": "/a"}), 1.0)
        fleet.refresh(replica)
        assert len(accepting(fleet, "a")) == number + 1
    assert sorted(accepting(fleet)) == ["r0", "r1", "r2"]
    assert fleet.prefill_rate("m")[0] == 3
    fleet.remove("r0")
    assert fleet.knows("a")
    replicas[1].receive(snapshot(2, adapter_paths={}), 2.0)
    fleet.refresh(replicas[1])
    assert not fleet.knows("a")
    assert sorted(accepting(fleet)) == ["r1", "r2"]
    assert fleet.prefill_rate("m")[0] == 2


def test_a_saturated_engine_works_but_accepts_nothing_now():
    fleet, replica = Fleet(), make_replica()
    fleet.add(replica)
    replica.book(req("a", 5000), num_kv_tokens=5000, now_s=0.0)
    fleet.refresh(replica)
    assert ids(fleet.working("m")) == ["r0"]
    assert accepting(fleet) == []


def test_a_name_stays_known_when_its_last_engine_is_gone():
    fleet = Fleet()
    fleet.add(make_replica())
    fleet.remove("r0")
    assert fleet.knows("m")
    assert not fleet.knows("n")
    assert fleet.working("m") == []


def test_a_lost_replica_is_not_filed_again():
    """Late events of its requests still reach the object."""
    fleet, lost = Fleet(), make_replica()
    fleet.add(lost)
    fleet.remove("r0")
    fleet.add(make_replica())
    fleet.refresh(lost)
    assert lost not in fleet.with_room(req(), 1, short=True)
    assert len(fleet) == 1


def test_time_to_prefill_counts_what_engines_have_and_what_waits():
    fleet, replica = Fleet(), make_replica()
    assert fleet.time_to_prefill_s("m", 100) is None
    fleet.add(replica)
    replica.book(req("a", 50), num_kv_tokens=50, now_s=0.0)
    replica.prefill_tokens_per_s = 10.0
    fleet.refresh(replica)
    assert fleet.time_to_prefill_s("m", 100) == pytest.approx(15.0)


def test_a_prompt_is_spread_over_the_steps_that_its_part_of_each_needs():
    fleet, replica = Fleet(), make_replica(max_prefill_chunk=50)
    fleet.add(replica)
    full_step_s = 100 / replica.prefill_tokens_per_s
    assert fleet.full_steps_s("m", 50) == pytest.approx(full_step_s)
    assert fleet.full_steps_s("m", 120) == pytest.approx(3 * full_step_s)
    assert fleet.full_steps_s("n", 120) == 0.0


def test_where_a_prompt_gets_all_of_a_step_it_is_not():
    fleet = Fleet()
    fleet.add(make_replica())
    assert fleet.full_steps_s("m", 120) == 0.0


def learned(replica_id: str, **fields):
    """A replica whose steps have taken 2 ms: ten times less than anybody would guess."""
    replica = make_replica(replica_id, **fields)
    for seq in range(1, 65):
        replica.receive(stepped(seq, 0.002, prefill=100, decodes=1), 0.002 * seq)
    return replica


def test_engines_with_few_steps_are_judged_by_others_of_their_kind():
    fleet, old = Fleet(), learned("old", device="H100")
    fast, other, experienced = (
        make_replica("fast", device="H100"),
        make_replica("other", device="A100"),
        make_replica("experienced", device="H100"),
    )
    experienced.receive(stepped(1, 0.1, prefill=100), 0.0)
    guess_s, own_s = other.ttft_s(100, 9.0), experienced.ttft_s(100, 9.0)
    for replica in (old, fast, other, experienced):
        fleet.add(replica)
    fleet.share_step_model(old)
    assert fast.ttft_s(100, 9.0) == pytest.approx(old.ttft_s(100, 9.0))
    assert other.ttft_s(100, 9.0) == guess_s
    assert experienced.ttft_s(100, 9.0) == pytest.approx(own_s, rel=0.01)


def test_a_step_model_is_shared_only_if_it_has_learned_more_than_the_last():
    fleet, old, newer, cold = (
        Fleet(),
        learned("old"),
        make_replica("newer"),
        make_replica("cold"),
    )
    newer.receive(stepped(1, 0.1, prefill=100), 0.0)
    for replica in (old, newer, cold):
        fleet.add(replica)
    fleet.share_step_model(newer)
    assert cold.ttft_s(100, 9.0) == pytest.approx(newer.ttft_s(100, 9.0), rel=0.01)
    fleet.share_step_model(old)
    shared_s = cold.ttft_s(100, 9.0)
    fleet.share_step_model(newer)
    assert cold.ttft_s(100, 9.0) == shared_s == pytest.approx(old.ttft_s(100, 9.0))


def test_an_engine_that_comes_later_starts_from_what_is_known():
    fleet, late = Fleet(), make_replica("late")
    fleet.add(old := learned("old"))
    fleet.share_step_model(old)
    fleet.remove("old")
    fleet.add(late)
    assert late.ttft_s(100, 9.0) == pytest.approx(old.ttft_s(100, 9.0))


def test_of_what_waits_as_much_is_taken_to_be_cached_as_lately_was():
    """By all of their tokens, coding agents would be refused that wait for a tenth of it."""
    fleet = Fleet()
    fleet.add(make_replica("r0"))
    whole_s = fleet.time_to_prefill_s("m", 10_000)
    for _ in range(300):
        fleet.reuse.record_placed("m", 1000, 900)
    assert fleet.time_to_prefill_s("m", 10_000) == pytest.approx(whole_s / 10, rel=0.02)
