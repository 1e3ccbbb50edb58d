"""Policies by the names that the configuration has for them."""

from collections.abc import Mapping

from router.policies.base import Policy
from router.policies.headway import Headway
from router.policies.least_requests import LeastRequests
from router.policies.least_response_time import LeastResponseTime
from router.policies.power_of_two import PowerOfTwo
from router.policies.round_robin import RoundRobin

POLICIES: Mapping[str, type[Policy]] = {
    "headway": Headway,
    "round_robin": RoundRobin,
    "least_requests": LeastRequests,
    "least_response_time": LeastResponseTime,
    "power_of_two": PowerOfTwo,
}

__all__ = ["POLICIES", "Policy"]
