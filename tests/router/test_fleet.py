import pytest
from router_builders import make_replica, req

from router.fleet import Fleet


def ids(replicas) -> list[str]:
    return [replica.id for replica in replicas]


def test_found_by_each_of_its_names():
    fleet = Fleet()
    fleet.add(make_replica("r0"))
    fleet.add(make_replica("r1", aliases=("lora",)))
    assert ids(fleet.open("m")) == ["r0", "r1"]
    assert ids(fleet.open("lora")) == ["r1"]
    assert fleet.open("other") == []


def test_a_full_engine_works_but_is_not_open():
    fleet, replica = Fleet(), make_replica()
    fleet.add(replica)
    replica.book(req("a", 5000), num_kv_tokens=5000, now_s=0.0)
    fleet.refresh(replica)
    assert ids(fleet.working("m")) == ["r0"]
    assert fleet.open("m") == []


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
    assert lost not in fleet.open("m")
    assert len(fleet) == 1


def test_drain_time_counts_what_engines_have_and_what_waits():
    fleet, replica = Fleet(), make_replica()
    assert fleet.drain_s("m", 100) is None
    fleet.add(replica)
    replica.book(req("a", 50), num_kv_tokens=50, now_s=0.0)
    replica.prefill_tokens_per_s = 10.0
    fleet.refresh(replica)
    assert fleet.drain_s("m", 100) == pytest.approx(15.0)


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
