"""Policies: which of the engines that may take a request gets it.

What is decided here: one engine out of those that the placer offers. Called by
`router.scheduling.placer` for every placement. One file per policy; its class registers
itself, and every file of this folder is imported here.
"""

import importlib
import pkgutil
import random
from collections.abc import Collection

from router.scheduling.ablation import check_parts
from router.scheduling.policies.base import POLICIES, Load, Policy

__all__ = ["POLICIES", "Load", "Policy", "check_policy", "make_policy"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def check_policy(name: str) -> str:
    """Return `name` if a policy has it; raise `ValueError` that lists the names otherwise."""
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}: one of {', '.join(POLICIES)}")
    return name


def make_policy(name: str, rng: random.Random, ablated: Collection[str]) -> Policy:
    """Return a new policy of this name that does without the parts in `ablated`.

    Raises `ValueError` for a policy or a part that does not exist.
    """
    check_policy(name)
    check_parts(ablated)
    return POLICIES[name](rng, ablated)
