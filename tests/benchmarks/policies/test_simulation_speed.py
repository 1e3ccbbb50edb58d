"""The simulator's speed: which part of it is the router's?"""

from benchmarks.policies.simulation_speed import is_router, router_share
from router.core import carry_out, router
from router.fleet import replica
from router.simulation import gateway
from router.simulation.engine import model
from router.simulation.workload.synthetic import poisson
from serving.capacity.profiles import load_profile
from serving.capacity.sweep import Fleet


def test_the_router_is_what_serves_too():
    assert all(is_router(each.__file__) for each in (router, replica))
    assert not any(is_router(each.__file__) for each in (gateway, model, carry_out))


def test_the_router_takes_a_part_of_the_time():
    workload = poisson(100, 0).at_rate(30.0)
    assert 0.1 < router_share(workload, Fleet(load_profile("h100"), 2), "headway") < 0.9
