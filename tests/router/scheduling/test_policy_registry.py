"""A new policy is one class: defined, it can be chosen by its name everywhere."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, get_args

import pytest
from pydantic import ValidationError

from router.core.settings import RouterSettings
from router.scheduling.ablation import PARTS, current_parts, renamed_parts
from router.scheduling.policies import POLICIES, Load, Policy, make_policy
from router.simulation.variant import policies, split
from router.types import Dispatch, Hold
from tests.support.builders import busy, make_router, req


@pytest.fixture(autouse=True)
def _forget_new_ones() -> Iterator[None]:
    before = dict(POLICIES)
    yield
    POLICIES.clear()
    POLICIES.update(before)


def define_last() -> type[Policy]:
    """Define a policy that takes the last engine and keeps what it is told of the load."""

    class Last(Policy):
        name = "last"
        holds = True

        def __init__(self, rng, ablated=()):
            super().__init__(rng, ablated)
            self.loads: list[Load] = []

        def choose(self, request, replicas, load, now_s):
            self.loads.append(load)
            return replicas[-1]

    return Last


def test_a_new_class_can_be_chosen_by_its_name():
    with pytest.raises(ValidationError):
        RouterSettings(policy="last")
    last = define_last()
    assert isinstance(make_policy("last", random.Random(0), ()), last)
    assert RouterSettings(policy="last").policy == "last"
    assert policies()[-1] == "last"
    assert split("last:hold") == ("last", ("hold",))
    router = make_router(3, policy="last")
    [decision] = router.on_arrival(req(), 0.0)
    assert isinstance(decision, Dispatch)
    assert decision.replica_id == "r2"


def test_the_settings_know_every_policy_and_name_them_all():
    for name, policy in POLICIES.items():
        assert policy.name == name
        assert RouterSettings(policy=name).policy == name
    with pytest.raises(ValidationError) as error:
        RouterSettings(policy="best")
    assert f"unknown policy 'best': one of {', '.join(POLICIES)}" in str(error.value)
    assert POLICIES[RouterSettings().policy].holds


def test_tables_name_ours_first_and_then_the_simplest():
    """Published results are in this order."""
    assert policies() == [
        "headway",
        "round_robin",
        "least_requests",
        "least_response_time",
        "power_of_two",
        "least_kv_usage",
        "cache_aware",
        "weighted_score",
        "lmetric",
        "vllm_dp",
    ]


def test_the_settings_know_every_part():
    assert get_args(get_args(RouterSettings.model_fields["ablate"].annotation)[0]) == PARTS
    assert RouterSettings(ablate=PARTS).ablate == PARTS


def test_two_policies_cannot_have_one_name():
    with pytest.raises(TypeError, match="Mine and RoundRobin are both 'round_robin'"):

        class Mine(Policy):
            name = "round_robin"

    assert POLICIES["round_robin"].__name__ == "RoundRobin"


def test_a_policy_needs_a_name():
    with pytest.raises(TypeError, match="Nameless needs a name"):

        class Nameless(POLICIES["headway"]):
            pass


def test_a_policy_may_be_a_dataclass_with_slots():
    """Which Python makes by defining the class a second time."""

    @dataclass(slots=True)
    class Slotted(Policy):
        name: ClassVar[str] = "slotted"
        rng: random.Random
        ablated: tuple[str, ...] = ()

    assert POLICIES["slotted"] is Slotted
    assert make_policy("slotted", random.Random(0), ()).ablated == ()


def test_a_policy_is_whole_once_it_is_made():
    policy = make_policy("headway", random.Random(0), ["order", "prefix", "order"])
    assert (policy.name, policy.ablated) == ("headway", ["order", "prefix"])
    assert not policy.wants_prefix
    assert not policy.wants_blocks
    whole = make_policy("headway", random.Random(0), ())
    assert (whole.ablated, whole.wants_prefix, whole.wants_blocks) == ([], True, True)


def test_a_policy_is_told_what_is_held_per_engine_to_choose_from():
    """Three are held, one after the other gets room on one of two engines."""
    define_last()
    router = make_router(2, policy="last")
    policy = router._placer.policy
    full = busy(num_free_kv_tokens=0)
    for replica_id in ("r0", "r1"):
        router.on_snapshot(replica_id, full, 0.1)
    for request_id in ("a", "b", "c"):
        assert router.on_arrival(req(request_id, 10), 0.2) == [Hold(request_id)]
    assert policy.loads == []
    assert len(router.on_snapshot("r1", busy(seq=2), 0.3)) == 3
    router.on_snapshot("r0", busy(seq=2), 0.4)
    router.on_arrival(req("d", 10), 0.5)
    assert [load.num_held_per_engine for load in policy.loads] == [3.0, 2.0, 1.0, 0.0]


class TestOldNamesOfParts:
    def test_stand_for_the_present_ones(self):
        parts = ("hold", "externality")
        assert current_parts(parts) == ("hold", "congestion_cost")
        assert renamed_parts(parts) == {"externality": "congestion_cost"}
        assert renamed_parts(PARTS) == {}
        assert current_parts(("hold", "luck")) == ("hold", "luck")

    def test_beside_the_present_one_are_refused(self):
        for function in (current_parts, renamed_parts):
            with pytest.raises(ValueError, match="externality is the old name of congestion_cost"):
                function(("externality", "congestion_cost"))

    def test_are_none_of_the_router_itself(self):
        """Shells make them present ones, or nobody would be warned."""
        with pytest.raises(ValueError, match="unknown part 'externality'"):
            make_policy("headway", random.Random(0), ["externality"])
