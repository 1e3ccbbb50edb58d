"""The newer order holds, in whichever order gateways hear of them."""

import itertools

import pytest

from serving.gateway.observe.peers import orders as module
from serving.gateway.observe.peers.orders import OrderBook, Orders

CONFIGURED = ("headway", ())


class Obeyed:
    """An order book and what it has had done."""

    def __init__(self, gateway_id: str, configured: tuple = CONFIGURED) -> None:
        self.done: list[tuple] = []
        self.book = OrderBook(gateway_id, configured, self.set_policy, self.drain)

    def set_policy(self, name: str, ablate: list[str]) -> None:
        if name == "unknown":
            raise ValueError("no policy is called unknown")
        self.done.append((name, *ablate))

    def drain(self, engine: str, drains: bool) -> None:
        self.done.append((engine, drains))


def test_each_hears_of_all_in_any_order_and_does_the_newest():
    giver, other = Obeyed("g0"), Obeyed("g1")
    told = []
    for give in (
        lambda: giver.book.set_policy("round_robin", []),
        lambda: giver.book.drain("e0", drains=True),
        lambda: giver.book.drain("e1", drains=True),
        lambda: giver.book.drain("e0", drains=False),
    ):
        give()
        orders = giver.book.orders
        told.append(Orders(orders.policy, dict(orders.engines)))
    other.book.take(told[0])
    other.book.set_policy("headway", ["order"])  # the other one's word is the newer one
    for heard in itertools.permutations((*told, other.book.orders)):
        third = Obeyed("g2")
        for orders in heard:
            third.book.take(orders)
        assert third.book.orders.policy.name == "headway"
        assert third.book.orders.policy.ablate == ["order"]
        drains = {name: order.drains for name, order in third.book.orders.engines.items()}
        assert drains == {"e0": False, "e1": True}
        last = {each[0]: each[1] for each in third.done if each[0] in drains}
        assert last == drains
        before = list(third.done)
        for orders in heard:
            third.book.take(orders)
        assert third.done == before  # nothing is done twice


def test_adapters_are_had_by_all_until_one_of_them_unloads_them():
    giver, other = Obeyed("g0"), Obeyed("g1")
    giver.book.order_adapter("a", "m", {"lora_name": "a"})
    loaded = Orders(adapters=dict(giver.book.orders.adapters))
    other.book.take(loaded)
    other.book.drain("e0", drains=True)
    other.book.order_adapter("a", "m", None)
    for heard in itertools.permutations((loaded, other.book.orders)):
        third = Obeyed("g2")
        for orders in heard:
            third.book.take(orders)
        assert third.book.orders.adapters["a"].load is None


def test_of_what_was_taken_back_the_newest_thousand_are_remembered(monkeypatch):
    monkeypatch.setattr(module, "_MAX_TAKEN_BACK", 3)
    book = Obeyed("g0").book
    book.order_adapter("stays", "m", {"lora_name": "stays"})
    book.drain("e", drains=True)
    for number in range(6):
        book.order_adapter(f"a{number}", "m", {"lora_name": f"a{number}"})
        book.order_adapter(f"a{number}", "m", None)
        book.drain(f"e{number}", drains=True)
        book.drain(f"e{number}", drains=False)
    assert list(book.orders.adapters) == ["stays", "a3", "a4", "a5"]
    assert list(book.orders.engines) == ["e", "e3", "e4", "e5"]


def test_two_at_once_agree():
    one, other = Obeyed("g0"), Obeyed("g1")
    one.book.set_policy("round_robin", [])
    other.book.set_policy("least_requests", [])
    first = one.book.orders.policy
    one.book.take(Orders(other.book.orders.policy))
    other.book.take(Orders(first))
    assert one.book.orders == other.book.orders
    assert one.done[-1] == other.done[-1] == ("least_requests",)


def test_a_policy_holds_for_its_configuration_and_a_drain_for_any():
    giver = Obeyed("g0")
    giver.book.set_policy("round_robin", [])
    giver.book.drain("e0", drains=True)
    redeployed = Obeyed("g1", configured=("least_requests", ()))
    redeployed.book.take(giver.book.orders)
    assert redeployed.done == [("e0", True)]


def test_a_policy_that_is_unknown_is_not_in_force():
    giver, other = Obeyed("g0"), Obeyed("g1")
    with pytest.raises(ValueError, match="no policy"):
        giver.book.set_policy("unknown", [])
    assert giver.book.orders == Orders()
    giver.set_policy = giver.book._set_policy = lambda *_: None  # it is of another version
    giver.book.set_policy("unknown", [])
    giver.book.drain("e0", drains=True)
    with pytest.raises(ValueError, match="no policy"):
        other.book.take(giver.book.orders)
    assert other.done == [("e0", True)]
    assert other.book.orders.policy is None
