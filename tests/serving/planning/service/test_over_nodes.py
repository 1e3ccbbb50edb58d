"""Where engines and gateways go on several machines, none of which needs to be here."""

import dataclasses
from typing import Any

import pytest

from serving.config import ConfigError, parse
from serving.planning.hardware import Hardware
from serving.planning.machine.listed import listed_nodes
from serving.planning.machine.nodes import Node, Nodes, this_machine
from serving.planning.model_size import ModelSize
from serving.planning.service.over_nodes import plan_nodes
from serving.planning.service.service_plan import ServicePlan, plan_service

GIB = 1 << 30
BIG = "8xH100-80GB,4xA100-40GB"


def nodes(text: str) -> Nodes:
    """Machines of a list, as Ray would name them: a, b, and so on."""
    return tuple(
        dataclasses.replace(node, name=name, node_id=f"id-{name}")
        for node, name in zip(listed_nodes(text), "abcdefgh", strict=False)
    )


def plan(text: str, size: ModelSize | None = None, **args: Any) -> ServicePlan:
    return plan_nodes(parse({"model": "org/m", **args}), nodes(text), [size] if size else None)


def numbers(planned: ServicePlan) -> dict[str, int]:
    """Engines of the only model, by node."""
    return {node: sum(engines.values()) for node, engines in planned.on_nodes.items()}


def only(planned: ServicePlan) -> Any:
    (found,) = planned.plans
    return found


class TestOnGpus:
    def test_auto_takes_the_gpus_of_all_nodes(self) -> None:
        planned = plan(BIG)
        assert numbers(planned) == {"a": 8, "b": 4}
        assert only(planned).num_replicas == 12
        assert only(planned).device_name == "H100-80GB or A100-40GB"
        assert only(planned).why[0] == "12 engines over 2 nodes, 8 on a, 4 on b: auto."

    def test_an_engine_never_spans_two_nodes(self) -> None:
        assert numbers(plan(BIG, tensor_parallel_size=3)) == {"a": 2, "b": 1}
        with pytest.raises(ConfigError, match=r"^tensor_parallel_size: .*none has more than 8"):
            plan(BIG, tensor_parallel_size=12)
        with pytest.raises(ConfigError, match=r"^replicas: engine 4 .* 2 on a, 1 on b: lower"):
            plan(BIG, tensor_parallel_size=3, replicas=4)

    def test_spread_takes_few_of_each_and_pack_few_nodes(self) -> None:
        four = "8xH100-80GB," * 3 + "8xH100-80GB"
        assert numbers(plan(four, replicas=4)) == {"a": 1, "b": 1, "c": 1, "d": 1}
        packed = plan(four, replicas=10, placement="pack")
        assert numbers(packed) == {"a": 8, "b": 2, "c": 0, "d": 0}
        options = only(packed).engine_actor_options
        assert options["label_selector"] == {"ray.io/node-id": "in(id-a,id-b)"}
        assert options["fallback_strategy"] == [{"label_selector": {}}]  # if both are lost
        assert "label_selector" not in only(plan(four, replicas=4)).engine_actor_options

    def test_a_node_that_is_too_small_gets_none_and_ray_is_told(self) -> None:
        planned = plan(BIG, ModelSize(60 * GIB, num_attention_heads=32))
        assert numbers(planned) == {"a": 8, "b": 0}
        assert only(planned).engine_actor_options["label_selector"] == {
            "ray.io/node-id": "!in(id-b)"
        }
        assert any(each.startswith("None on b: ") for each in only(planned).why)

    def test_a_model_that_fits_nowhere_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"^tensor_parallel_size: the weights are"):
            plan(BIG, ModelSize(200 * GIB, num_attention_heads=32))

    def test_several_models_share_the_cluster(self) -> None:
        models = [
            {"model": "org/large", "tensor_parallel_size": 4, "replicas": 2},
            {"model": "org/small"},
        ]
        planned = plan_nodes(parse({"models": models}), nodes(BIG))
        assert planned.on_nodes == {
            "a": {"org/large": 1, "org/small": 4},
            "b": {"org/large": 1},
        }

    def test_models_that_come_and_go_share_what_is_left(self) -> None:
        models = [
            {"model": "org/a", "replicas": {"min": 1, "max": 10}},
            {"model": "org/b", "replicas": {"min": 1, "max": 10}},
            {"model": "org/c", "replicas": 2},
        ]
        planned = plan_nodes(parse({"models": models}), nodes(BIG))
        assert planned.num_shared_gpus == 10
        assert [each.num_replicas for each in planned.plans] == [10, 10, 2]

    def test_more_than_there_is_room_for_waits_for_nodes(self) -> None:
        planned = plan(BIG, replicas={"min": 1, "max": 20})
        assert only(planned).num_replicas == 20
        assert planned.warnings[0].startswith("12 of at most 20 engines have room")


class TestOnCores:
    def test_auto_puts_one_on_each_node(self) -> None:
        planned = plan("8xCPU-16GB,4xCPU-8GB,4xCPU-8GB", model=None)
        assert numbers(planned) == {"a": 1, "b": 1, "c": 1}

    def test_auto_leaves_out_what_holds_none(self) -> None:
        planned = plan("8xCPU-16GB,4xCPU-2GB,4xCPU-8GB", model=None)
        assert numbers(planned) == {"a": 1, "b": 0, "c": 1}

    def test_the_smallest_node_decides_on_memory(self) -> None:
        alone = plan_service(parse({"replicas": 2}), nodes("8xCPU-32GB")[0].hardware)
        planned = plan("8xCPU-32GB,4xCPU-4GB", model=None, replicas=2)
        assert numbers(planned) == {"a": 1, "b": 1}
        assert only(planned).num_kv_bytes < only(alone).num_kv_bytes

    def test_what_memory_does_not_hold_goes_elsewhere(self) -> None:
        assert numbers(plan("8xCPU-32GB,4xCPU-2GB", model=None, replicas=3)) == {"a": 3, "b": 0}

    def test_every_node_has_the_cpus_that_its_engines_ask_for(self) -> None:
        planned = plan("4xCPU-64GB,2xCPU-64GB", model=None, replicas=9, engine="emulated")
        asked = only(planned).engine_actor_options["num_cpus"]
        for node, number in numbers(planned).items():
            assert asked * number <= {"a": 4, "b": 2}[node]

    def test_a_head_without_cpus_has_gateways_and_no_engines(self) -> None:
        head, worker = nodes("4xCPU-16GB,4xCPU-16GB")
        head = dataclasses.replace(head, num_cpus=0.0)
        planned = plan_nodes(parse({"replicas": 2, "engine": "emulated"}), (head, worker))
        assert numbers(planned) == {"b": 2}
        assert only(planned).gateway_actor_options == {
            "num_cpus": 0,
            "resources": {"node:__internal_head__": 0.001},
        }


class TestGateways:
    def test_they_are_on_the_head_node(self) -> None:
        planned = plan(BIG, gateway={"replicas": "auto"})
        assert planned.num_gateways == 3  # 12 engines, four to each
        assert planned.max_gateways_per_node == 0
        assert "Gateways are on the head node, a: clients connect there." in planned.why

    def test_or_on_every_node(self) -> None:
        planned = plan(BIG, gateway={"replicas": 2, "placement": "nodes"})
        assert (planned.num_gateways, planned.max_gateways_per_node) == (4, 2)
        assert "resources" not in only(planned).gateway_actor_options

    def test_haproxy_finds_them_wherever_they_are(self) -> None:
        planned = plan(BIG, gateway={"front": "haproxy", "placement": "nodes"})
        assert (planned.num_gateways, planned.max_gateways_per_node) == (1, 0)


def test_a_single_node_is_planned_as_ever() -> None:
    hardware = Hardware(tuple(range(4)), 16 * GIB, 16 * GIB)
    config = parse({"replicas": 2})
    assert plan_nodes(config, this_machine(hardware)) == plan_service(config, hardware)


class TestEdits:
    """What is planned beside engines that run."""

    def of(self, *models: dict[str, Any], running: ServicePlan | None = None) -> ServicePlan:
        config = parse({"models": list(models)})
        return plan_nodes(config, nodes("8xcpu-64GB,8xcpu-64GB"), running=running)

    def test_gateways_and_what_runs_stay_as_they_are(self) -> None:
        one, other = ({"model": f"org/{name}", "replicas": 2} for name in ("one", "other"))
        third = {"model": "org/third", "replicas": 12}
        before = self.of(one, other)
        after = self.of(other, third, running=before)
        assert after.num_gateways == before.num_gateways
        assert after.plans[0] == dataclasses.replace(before.plans[1], why=after.plans[0].why)
        assert after.plans[1].gateway_actor_options == before.plans[0].gateway_actor_options
        num_cpus = before.plans[0].engine_actor_options["num_cpus"]
        assert after.plans[1].engine_actor_options["num_cpus"] == num_cpus

    def test_a_new_model_takes_cores_that_nobody_has(self) -> None:
        one, other, third = (
            {"model": f"org/{name}", "replicas": 4} for name in ("one", "other", "third")
        )
        before = self.of(one, other)  # two on each node
        assert [plan.first_core for plan in before.plans] == [0, 2]
        after = self.of(other, third, running=before)
        assert [plan.first_core for plan in after.plans] == [2, 0]
        after = self.of(third, one, other, running=before)
        assert [plan.first_core for plan in after.plans] == [4, 0, 2]


class TestLists:
    def test_what_is_not_said_is_assumed(self) -> None:
        first, second = listed_nodes("8xH100-80GB, 16xcpu-64GB")
        assert [gpu.name for gpu in first.hardware.gpus] == ["H100-80GB"] * 8
        assert 79 * GIB < first.hardware.gpus[0].num_bytes < 80 * GIB
        assert (first.is_head, second.is_head) == (True, False)
        assert (len(second.hardware.cores), second.hardware.num_ram_bytes) == (16, 64 * GIB)

    def test_names_may_have_spaces_and_dashes(self) -> None:
        (node,) = listed_nodes("2xRTX PRO-6000-96GB")
        assert node.hardware.gpus[1].name == "RTX PRO-6000-96GB"

    @pytest.mark.parametrize("text", ["", "8", "8xH100", "0xH100-80GB", "8xH100-80GB,", "x-1GB"])
    def test_what_cannot_be_read_is_one_line(self, text: str) -> None:
        with pytest.raises(ConfigError, match=r"^--hardware: .* is not of the form"):
            listed_nodes(text)


def test_a_node_without_cpus_and_gpus_cannot_work() -> None:
    hardware = Hardware((0,), GIB, GIB)
    assert not Node("a", hardware, 0.0).can_work
    with pytest.raises(ConfigError, match="no node with CPUs or GPUs"):
        plan_nodes(parse({}), (Node("a", hardware, 0.0), Node("b", hardware, 0.0)))
