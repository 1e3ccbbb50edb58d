"""What a request waits for its adapter: loading, or a place among those that can be resident."""

import pytest

from router.estimators.adapter_load import Adapters
from router.types import AdapterState

PATHS = {name: f"/{name}" for name in "abcd"}


def adapters(max_loras: int = 1, **state) -> Adapters:
    made = Adapters(max_loras, PATHS)
    made.learn(AdapterState(**{"load_s": {"a": 0.2, "b": 0.4}} | state))
    return made


def test_what_is_resident_or_on_its_way_costs_nothing():
    some = adapters(resident=["a"], cached=["b"], swap_s=0.01)
    assert (some.load_s("a"), some.load_s("b")) == (0.0, 0.01)
    assert some.load_s("c") == pytest.approx(0.3)  # of which nothing is known: the mean
    assert some.load_s("base") == 0.0
    some.book("c")
    assert some.load_s("c") == 0.0
    assert some.loading_s() == pytest.approx(0.3)
    some.release("c")
    assert some.load_s("c") == pytest.approx(0.3)
    assert some.loading_s() == 0.0


def test_another_adapter_of_the_same_name_is_unknown():
    some = adapters()
    some.use_paths({**PATHS, "b": "/elsewhere"})
    assert some.load_s("b") == some.load_s("a") == 0.2


def test_what_workers_still_tell_of_an_unloaded_one_is_not_kept():
    some = adapters()
    some.use_paths({"a": "/a"})
    some.learn(AdapterState(load_s={"a": 0.2, "b": 0.4}))
    some.use_paths({"a": "/a", "b": "/another"})
    assert some.load_s("b") == 0.2  # nothing is known of it: the mean


def test_it_waits_while_as_many_others_are_in_use_as_can_be():
    some = adapters(resident=["a"], num_requests={"a": 1})
    assert some.wait_s("a", 10.0) == 0.0
    assert some.wait_s("b", 10.0) == 5.0  # of one that is on its way half is left
    some.book("a")
    some.book("a")
    assert some.wait_s("b", 10.0) == pytest.approx(20.0 / 3.0)  # the last of two to end
    some.book("c")
    assert some.wait_s("b", 10.0) == 15.0  # c goes first
    assert some.delay_s("b", 10.0) == 15.4
    assert some.wait_s("base", 10.0) == 0.0
    for name in ("a", "a", "c", "unknown"):
        some.release(name)
    assert some.wait_s("b", 10.0) == 5.0  # as reported
    some.learn(AdapterState(resident=["a"]))
    assert some.wait_s("b", 10.0) == 0.0


def test_with_room_for_two_the_third_waits():
    some = adapters(2, resident=["a", "b"], num_requests={"a": 1})
    assert some.wait_s("c", 10.0) == 0.0
    assert some.evicts("c")
    some.book("b")
    assert some.wait_s("c", 10.0) == 5.0
    assert not adapters(2, resident=["a"]).evicts("c")


def test_what_is_reported_and_booked_is_counted_once():
    some = adapters(resident=["a"])
    some.book("a")
    some.book("base")
    assert some.state().num_requests == {"a": 1}
    some.learn(AdapterState(resident=["a"], num_requests={"a": 3}))  # two of another gateway
    assert some.state().num_requests == {"a": 3}
