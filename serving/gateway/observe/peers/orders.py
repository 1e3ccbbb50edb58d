"""Which orders of admins are in force: the policy, the engines drained, the adapters loaded?

Each order has a version, and the newer one holds, whichever gateway hears of it in which order: a
gateway that starts later, or hung meanwhile, takes over what others have (a last-writer-wins
register; versions are Lamport's clock with the gateway's id, so no two are alike).
"""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

Version = tuple[int, str]  # greater is newer; the gateway that gave the order

# What was taken back is remembered, or a gateway that has not heard of it would have it again; but
# not for ever, where adapters come and go by the thousand.
_MAX_TAKEN_BACK = 1000


class PolicyOrder(msgspec.Struct, frozen=True):
    """Choose by this policy, without these parts."""

    version: Version
    name: str
    ablate: list[str]
    # What was configured where it was given: it holds for no other configuration, or a deployment
    # that configures another policy would never get it.
    configured: tuple[str, list[str]]


class DrainOrder(msgspec.Struct, frozen=True):
    """Send an engine no new work, or some again."""

    version: Version
    drains: bool


class AdapterOrder(msgspec.Struct, frozen=True):
    """Have a model's engines serve a LoRA adapter, or no longer."""

    version: Version
    model: str
    load: dict[str, Any] | None  # what an engine is told to serve it; None: it is not to


class Orders(msgspec.Struct):
    """All that is in force beside the configuration."""

    policy: PolicyOrder | None = None
    engines: dict[str, DrainOrder] = {}  # by engine, those that were taken back among them
    adapters: dict[str, AdapterOrder] = {}  # by name, those that were unloaded among them


class OrderBook:
    """The orders in force on one gateway."""

    def __init__(
        self,
        gateway_id: str,
        configured: tuple[str, Sequence[str]],
        set_policy: Callable[[str, Sequence[str]], None],
        drain: Callable[[str, bool], None],
    ) -> None:
        """`configured` are the policy and the parts that it goes without.

        `set_policy` raises `ValueError` for what it does not know; `drain` is told of an engine and
        whether it drains.
        """
        self.orders = Orders()
        self._gateway_id = gateway_id
        self._configured = (configured[0], list(configured[1]))
        self._set_policy = set_policy
        self._drain = drain

    def set_policy(self, name: str, ablate: Sequence[str]) -> None:
        """Have a policy from now on. Raise `ValueError` for an unknown name or part."""
        order = PolicyOrder(self._next_version(), name, list(ablate), self._configured)
        self.take(Orders(policy=order))

    def drain(self, engine: str, *, drains: bool) -> None:
        """Send an engine no new work from now on, or some again."""
        self.take(Orders(engines={engine: DrainOrder(self._next_version(), drains)}))

    def order_adapter(self, name: str, model: str, load: dict[str, Any] | None) -> None:
        """Have this adapter from now on, also on engines that join; with None no longer."""
        self.take(Orders(adapters={name: AdapterOrder(self._next_version(), model, load)}))

    def take(self, orders: Orders) -> None:
        """Carry out what is newer than what is in force.

        Raise `ValueError` for a policy that is not known here, after all else.
        """
        known = self.orders.engines
        for engine, order in orders.engines.items():
            if engine not in known or order.version > known[engine].version:
                known[engine] = order
                self._drain(engine, order.drains)
        for name, adapter in orders.adapters.items():
            before = self.orders.adapters.get(name)
            if before is None or adapter.version > before.version:
                self.orders.adapters[name] = adapter
        _forget_oldest(known, [key for key, order in known.items() if not order.drains])
        adapters = self.orders.adapters
        _forget_oldest(adapters, [key for key, order in adapters.items() if order.load is None])
        policy, now = orders.policy, self.orders.policy
        if policy is None or policy.configured != self._configured:
            return
        if now is None or policy.version > now.version:
            self._set_policy(policy.name, policy.ablate)
            self.orders.policy = policy

    def _next_version(self) -> Version:
        known = [order.version[0] for order in self.orders.engines.values()]
        known += [order.version[0] for order in self.orders.adapters.values()]
        if self.orders.policy is not None:
            known.append(self.orders.policy.version[0])
        return max(known, default=0) + 1, self._gateway_id


def _forget_oldest(orders: dict[str, Any], taken_back: list[str]) -> None:
    """Forget the oldest of those that were taken back, if they are too many."""
    num_too_many = len(taken_back) - _MAX_TAKEN_BACK
    if num_too_many > 0:
        for key in sorted(taken_back, key=lambda each: orders[each].version)[:num_too_many]:
            del orders[key]
