"""Policies by the names that the configuration has for them."""

import random
from collections.abc import Collection, Mapping
from typing import get_args

from router.scheduling.policies.base import Policy
from router.scheduling.policies.cache_aware import CacheAware
from router.scheduling.policies.headway import Headway
from router.scheduling.policies.least_kv_usage import LeastKvUsage
from router.scheduling.policies.least_requests import LeastRequests
from router.scheduling.policies.least_response_time import LeastResponseTime
from router.scheduling.policies.power_of_two import PowerOfTwo
from router.scheduling.policies.round_robin import RoundRobin
from router.scheduling.policies.weighted_score import WeightedScore
from router.settings import Part

POLICIES: Mapping[str, type[Policy]] = {
    "headway": Headway,
    "round_robin": RoundRobin,
    "least_requests": LeastRequests,
    "least_response_time": LeastResponseTime,
    "power_of_two": PowerOfTwo,
    "least_kv_usage": LeastKvUsage,
    "cache_aware": CacheAware,
    "weighted_score": WeightedScore,
}

__all__ = ["POLICIES", "Policy", "make_policy"]


def make_policy(name: str, rng: random.Random, ablate: Collection[str]) -> Policy:
    """A new policy of this name, without the parts named in `ablate`.

    Raises `ValueError` for a name that is not in `POLICIES` and for a part that
    does not exist.
    """
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}: one of {', '.join(POLICIES)}")
    parts = get_args(Part)
    if unknown := set(ablate).difference(parts):
        raise ValueError(f"unknown part {min(unknown)!r} to ablate: one of {', '.join(parts)}")
    policy = POLICIES[name](rng)
    policy.name = name
    policy.ablate(ablate)
    return policy
