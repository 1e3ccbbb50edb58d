"""Policies by the names that the configuration has for them."""

from collections.abc import Mapping

from router.policies.base import Policy
from router.policies.cache_aware import CacheAware
from router.policies.headway import Headway
from router.policies.least_kv_usage import LeastKvUsage
from router.policies.least_requests import LeastRequests
from router.policies.least_response_time import LeastResponseTime
from router.policies.power_of_two import PowerOfTwo
from router.policies.round_robin import RoundRobin
from router.policies.weighted_score import WeightedScore

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

__all__ = ["POLICIES", "Policy"]
