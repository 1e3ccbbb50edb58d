"""How many gateways `auto` starts, on hardware that this machine need not have."""

from typing import Any

import pytest

from serving.cluster.application import build
from serving.config import ConfigError, parse
from serving.planning.gateways import CORE_ENGINES_PER_GATEWAY
from serving.planning.hardware import Gpu, Hardware
from serving.planning.plan import Plan, make_plan

GIB = 1 << 30
EMULATED = {"factory": "serving.engine.emulated.engine:EmulatedEngine"}


def node(num_cores: int, num_gpus: int = 0) -> Hardware:
    gpu = Gpu(0, "NVIDIA H100 80GB HBM3", 80 * GIB, 79 * GIB, "9.0", 18)
    return Hardware(
        cores=tuple(range(num_cores)),
        num_ram_bytes=2048 * GIB,
        num_free_ram_bytes=2000 * GIB,
        gpus=(gpu,) * num_gpus,
        vllm_build="cuda" if num_gpus else "cpu",
    )


def plan_of(hardware: Hardware, gateways: Any = "auto", **args: Any) -> Plan:
    if hardware.gpus:
        args = {"model": "org/Model-8B", **args}
    return make_plan(parse({"gateway": {"replicas": gateways}, **args}), hardware)


def told(plan: Plan) -> str:
    return " ".join(sentence for sentence in plan.why if "gateway" in sentence)


def test_two_cores_and_two_engines_get_one() -> None:
    plan = plan_of(node(2))
    assert (plan.num_replicas, plan.num_gateways) == (2, 1)
    assert told(plan).startswith("1 gateway: one per 64 engines")


@pytest.mark.parametrize(
    ("num_gpus", "num_cores", "num_gateways"), [(1, 64, 1), (4, 64, 1), (5, 64, 2), (8, 64, 2)]
)
def test_one_per_four_engines_on_gpus(num_gpus: int, num_cores: int, num_gateways: int) -> None:
    plan = plan_of(node(num_cores, num_gpus))
    assert plan.num_gateways == num_gateways
    assert "one per 4 engines" in told(plan)


@pytest.mark.parametrize(
    ("tensor", "num_cores", "num_gateways"),
    [(1, 16, 1), (1, 17, 1), (1, 18, 2), (1, 4, 1), (2, 18, 1), (8, 64, 1)],
)
def test_no_more_than_cores_that_engines_leave(
    tensor: int, num_cores: int, num_gateways: int
) -> None:
    """An engine takes two, and one more for each GPU of several."""
    plan = plan_of(node(num_cores, 8), tensor_parallel_size=tensor)
    assert plan.num_gateways == num_gateways
    if tensor == 1 and num_gateways == 1:
        assert f"the engines leave {max(0, num_cores - 16)} of {num_cores} cores" in told(plan)
        assert "2 would be one per 4 engines" in told(plan)


def test_engines_on_cores_bring_few_tokens() -> None:
    many = CORE_ENGINES_PER_GATEWAY + 1
    assert plan_of(node(96), replicas=many).num_gateways == 2
    assert plan_of(node(96), replicas=many - 1).num_gateways == 1
    assert plan_of(node(64), replicas=many).num_gateways == 1


def test_emulated_engines_count_as_those_that_they_emulate() -> None:
    assert plan_of(node(16), replicas=8, engine=EMULATED).num_gateways == 2
    assert plan_of(node(2), replicas=8, engine=EMULATED).num_gateways == 1


def test_a_number_stays_what_it_is() -> None:
    for num_gateways in (1, 2, 9):
        assert plan_of(node(2), num_gateways).num_gateways == num_gateways
        assert told(plan_of(node(2), num_gateways)) == ""
    assert make_plan(parse({}), node(2)).num_gateways == 1
    assert told(plan_of(node(64, 8), 1)) == "gateway.replicas: auto would start 2 gateways."


def test_no_more_than_there_are_ports() -> None:
    hardware = node(64, 8)
    config = {"model": "m", "gateway": {"replicas": "auto", "metrics_port": 65_535}}
    plan = make_plan(parse(config), hardware)
    assert plan.num_gateways == 1
    assert "gateway.metrics_port leaves no port to more; 2 would be" in told(plan)


@pytest.mark.parametrize("replicas", [0, -1, "many", 1.5])
def test_what_is_no_number_of_gateways(replicas: Any) -> None:
    with pytest.raises(ConfigError, match=r"gateway\.replicas"):
        parse({"gateway": {"replicas": replicas}})


def test_gateways_are_told_how_many_they_are() -> None:
    """Each holds to its part of the limits, so it must know the number."""
    args = {"engine": "emulated", "gateway": {"replicas": "auto", "port": 8123}}
    application = build(args)
    deployed = parse(application._bound_deployment.init_args[0]).gateway
    assert deployed.num_replicas == application._bound_deployment.num_replicas >= 1
    assert deployed.port == 8123
    assert args["gateway"]["replicas"] == "auto"  # the caller's own stay as they are
    with pytest.raises(ValueError, match="only the plan"):
        parse(args).gateway.num_replicas  # noqa: B018
