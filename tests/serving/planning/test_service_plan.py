"""How several models share hardware that this machine need not have."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving.config import ConfigError, parse
from serving.planning.hardware import Gpu, Hardware
from serving.planning.model_size import ModelSize
from serving.planning.service.service_plan import (
    ServicePlan,
    changes,
    deployment_name,
    plan_service,
)

GIB = 1 << 30
LARGE = {"model": "org/large-32B", "tensor_parallel_size": 2, "served_model_name": "large"}
SMALL = {"model": "org/small-8B", "aliases": ["small", "default"]}
EMBED = {"model": "org/embed-1B", "served_model_name": "embed"}
TINY = {"model": "tiny", "served_model_name": "tiny"}
TINY_SIZE = ModelSize(GIB // 4, 1024, 1000, 2)


def h100s(number: int = 8, num_gib: int = 80) -> Hardware:
    gpus = tuple(
        Gpu(i, f"NVIDIA H100 {num_gib}GB", num_gib * GIB, (num_gib - 1) * GIB, "9.0", 18)
        for i in range(number)
    )
    return Hardware(tuple(range(64)), 512 * GIB, 500 * GIB, gpus=gpus, vllm_build="cuda")


def cores(number: int = 2, num_free_gib: float = 16) -> Hardware:
    free = int(num_free_gib * GIB)
    return Hardware(tuple(range(number)), free, free, cpu_name="CPU", vllm_build="cpu")


def plan(hardware: Hardware, *models: dict[str, Any], **more: Any) -> ServicePlan:
    return plan_service(parse({"models": list(models), **more}), hardware)


def numbers(planned: ServicePlan) -> dict[str, int]:
    return {each.served_model_name: each.num_replicas for each in planned.plans}


def replan(running: ServicePlan, hardware: Hardware, *models: dict[str, Any]) -> ServicePlan:
    return plan_service(parse({"models": list(models)}), hardware, running=running)


class TestOnGpus:
    def test_three_models_share_eight_gpus(self) -> None:
        """Numbers are kept; models on auto share what is left, the one with least first."""
        planned = plan(h100s(), LARGE | {"replicas": 1}, SMALL, EMBED)
        assert numbers(planned) == {"large": 1, "org/small-8B": 3, "embed": 3}
        assert planned.why[0] == (
            "8 GPUs here: large 1 × 2 GPUs, org/small-8B 3 × 1 GPU, embed 3 × 1 GPU."
        )
        asked = [each.engine_actor_options["num_gpus"] for each in planned.plans]
        assert asked == [2, 1, 1]
        assert planned.plans[1].aliases == ("small", "default")
        assert planned.plans[0].why[0] == "1 engine of 2 GPUs: models.0.replicas is set."
        assert "auto, its share of the GPUs" in planned.plans[1].why[0]

    def test_what_nobody_can_use_stays_idle(self) -> None:
        planned = plan(h100s(5), LARGE, EMBED | {"replicas": 2})
        assert numbers(planned) == {"large": 1, "embed": 2}
        assert planned.why[0].endswith("; 1 GPU stays idle.")

    @pytest.mark.parametrize(
        ("models", "line"),
        [
            (
                (LARGE | {"replicas": 4}, SMALL),
                "models: large 4 × 2 GPUs, org/small-8B 1 × 1 GPU need 9 GPUs, this node has 8: "
                "lower models.0.replicas",
            ),
            (
                (LARGE | {"tensor_parallel_size": 8}, SMALL),
                "models: large 1 × 8 GPUs, org/small-8B 1 × 1 GPU need 9 GPUs, this node has 8: "
                "lower models.0.tensor_parallel_size, or remove a model",
            ),
        ],
    )
    def test_what_does_not_fit_is_one_line_with_the_key(self, models: Any, line: str) -> None:
        with pytest.raises(ConfigError) as error:
            plan(h100s(), *models)
        assert str(error.value) == line

    def test_weights_beyond_a_gpu_name_the_models_key(self) -> None:
        config = parse({"models": [SMALL, LARGE | {"tensor_parallel_size": 1}]})
        sizes = [ModelSize(16 * GIB), ModelSize(100 * GIB)]
        with pytest.raises(ConfigError, match=r"^models.1.tensor_parallel_size: the weights are"):
            plan_service(config, h100s(), sizes)

    def test_where_gpus_differ_the_smallest_has_to_hold_the_model(self) -> None:
        mixed = dataclasses.replace(h100s(), gpus=(*h100s(4).gpus, *h100s(4, 24).gpus))
        config = parse({"models": [SMALL | {"replicas": 1}, EMBED | {"replicas": 1}]})
        sizes = [ModelSize(30 * GIB), ModelSize(2 * GIB)]
        with pytest.raises(ConfigError, match=r"models.0.tensor_parallel_size"):
            plan_service(config, mixed, sizes)
        planned = plan_service(config, mixed, [ModelSize(3 * GIB), ModelSize(2 * GIB)])
        assert any("GPUs differ" in each for each in planned.warnings)

    def test_a_model_without_a_name_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"^models.1.model: name the model"):
            plan(h100s(), SMALL, {"served_model_name": "x"})


class TestThoseThatComeAndGo:
    def test_if_the_most_of_all_fits_nobody_shares(self) -> None:
        planned = plan(
            h100s(), LARGE | {"replicas": {"max": 2}}, SMALL | {"replicas": {"min": 0, "max": 4}}
        )
        assert numbers(planned) == {"large": 2, "org/small-8B": 4}
        assert planned.num_shared_gpus == 0
        assert planned.plans[0].why[0].endswith("models.0.replicas.max is set.")
        assert planned.plans[1].why[-1] == "0 to 4 of them, as many as are needed."

    def test_else_they_share_what_the_others_leave(self) -> None:
        planned = plan(
            h100s(),
            LARGE | {"replicas": {"min": 1, "max": 3}},
            SMALL | {"idle_sleep_s": 60, "replicas": 4},
            EMBED | {"replicas": 2},
        )
        assert numbers(planned) == {"large": 3, "org/small-8B": 4, "embed": 2}
        assert planned.num_shared_gpus == 6
        assert planned.why[0] == (
            "8 GPUs here, for 12 at most: large 1 to 3 × 2 GPUs, org/small-8B 0 to 4 × 1 GPU, "
            "embed 2 × 1 GPU. What one model gives up another may take."
        )

    @pytest.mark.parametrize(
        ("models", "line"),
        [
            (
                (LARGE | {"replicas": {"max": 4}}, EMBED | {"replicas": 2}),
                "models: large 1 to 4 × 2 GPUs, embed 2 × 1 GPU: beside what always runs this "
                "node with 8 GPUs has room for 3 engines of large: lower models.0.replicas.max",
            ),
            (
                (LARGE | {"replicas": {"min": 4, "max": 4}}, EMBED | {"replicas": 2}),
                "models: large 4 × 2 GPUs, embed 2 × 1 GPU: what always runs needs 10 GPUs, this "
                "node has 8: lower models.0.replicas.min",
            ),
        ],
    )
    def test_what_cannot_be_is_one_line_with_the_key(self, models: Any, line: str) -> None:
        with pytest.raises(ConfigError) as error:
            plan(h100s(), *models)
        assert str(error.value) == line

    def test_one_that_sleeps_is_planned_with_all_that_it_has_awake(self) -> None:
        [planned] = plan_service(parse({"idle_sleep_s": 60}), cores(4, 64)).plans
        assert planned.num_replicas == 2
        assert planned.why[-1] == "0 to 2 of them, as many as are needed."

    def test_memory_has_to_hold_the_most_of_all(self) -> None:
        config = parse({"models": [{}, TINY | {"replicas": {"max": 2}}]})
        with pytest.raises(ConfigError, match=r"lower models.1.replicas.max$"):
            plan_service(config, cores(num_free_gib=6), [None, TINY_SIZE])

    def test_an_edit_of_the_bounds_is_said(self) -> None:
        before = plan(cores(4, 64), {}, TINY | {"replicas": 2})
        ranged = replan(before, cores(4, 64), {}, TINY | {"replicas": {"min": 0, "max": 2}})
        assert changes(before, ranged) == ["model tiny is resized: from 2 to 0 to 2."]
        bounds = {"min": 0, "max": 2, "goodput": 0.99}
        other = replan(before, cores(4, 64), {}, TINY | {"replicas": bounds})
        assert changes(ranged, other) == ["model tiny comes and goes by other settings."]
        assert changes(other, other) == []


class TestOnCores:
    def test_two_models_have_an_engine_and_a_core_each(self) -> None:
        planned = plan(cores(), {}, TINY)
        assert numbers(planned) == {"SmolLM2-135M-Instruct": 1, "tiny": 1}
        assert [each.first_core for each in planned.plans] == [0, 1]
        assert all(each.num_kv_bytes == GIB for each in planned.plans)
        assert not planned.warnings

    def test_more_cores_are_two_engines_each(self) -> None:
        planned = plan(cores(8, 64), {}, TINY)
        assert [each.num_replicas for each in planned.plans] == [2, 2]
        assert [each.first_core for each in planned.plans] == [0, 2]

    def test_all_kv_caches_shrink_where_memory_is_short(self) -> None:
        config = parse({"models": [{}, TINY]})
        planned = plan_service(config, cores(num_free_gib=6.5), [None, TINY_SIZE])
        kv = [each.num_kv_bytes for each in planned.plans]
        assert all(64 << 20 < each < GIB for each in kv)
        total = sum(each.num_engine_bytes or 0 for each in planned.plans)
        assert total <= 5.3 * GIB

    def test_memory_that_does_not_hold_them_is_one_line(self) -> None:
        config = parse({"models": [{}, TINY | {"replicas": 2}]})
        with pytest.raises(ConfigError) as error:
            plan_service(config, cores(num_free_gib=6), [None, TINY_SIZE])
        line = str(error.value)
        assert line.startswith("models: the bundled model 1 × 2.4 GiB, tiny 2 × 2.4 GiB and")
        assert line.endswith("lower models.1.replicas")

    def test_more_engines_than_cores_are_warned_of(self) -> None:
        planned = plan(cores(2, 64), {"replicas": 2}, TINY)
        assert any("3 engines share 2 cores" in each for each in planned.warnings)

    def test_ray_has_room_for_engines_that_come_later(self) -> None:
        planned = plan(cores(), {}, TINY)
        asked = sum(each.engine_actor_options["num_cpus"] for each in planned.plans)
        gateways = planned.plans[0].gateway_actor_options["num_cpus"]
        assert 3 * asked + gateways <= 2

    def test_default_names_that_clash_are_refused(self) -> None:
        emulated = {"engine": "emulated"}
        with pytest.raises(ConfigError, match=r"name .* is that of models.0 already"):
            plan(
                cores(),
                emulated | {"aliases": []},
                {**emulated, "served_model_name": "m"} | {"aliases": ["meta-llama/Llama-3.1-8B"]},
            )


class TestEdits:
    def test_what_runs_keeps_what_it_has(self) -> None:
        before = plan(cores(4), {}, TINY)
        after = replan(before, cores(4), {}, EMBED | {"replicas": 1})
        assert after.plans[0] == before.plans[0]
        assert after.plans[1].first_core == 2
        assert changes(before, after) == [
            "model embed is added: 1 engine start.",
            "model tiny is removed: what it has begun may finish.",
        ]

    def test_a_resized_model_keeps_its_arguments(self) -> None:
        before = plan(cores(4), {"replicas": 1}, TINY | {"replicas": 1})
        after = replan(before, cores(4), {"replicas": 1}, TINY | {"replicas": 2})
        was, now = before.plans[1], after.plans[1]
        assert now.num_replicas == 2
        assert (now.engine_args, now.engine_actor_options) == (
            was.engine_args,
            was.engine_actor_options,
        )
        assert changes(before, after) == ["model tiny is resized: from 1 to 2."]

    def test_a_changed_engine_is_replaced(self) -> None:
        before = plan(cores(), {}, TINY)
        after = replan(before, cores(), {}, TINY | {"engine": {"args": {"max_model_len": 512}}})
        assert after.plans[1].engine_args["max_model_len"] == 512
        assert after.plans[1].deployment == before.plans[1].deployment
        [said] = changes(before, after)
        assert said.startswith("model tiny has changed")

    def test_other_targets_start_nothing(self) -> None:
        before = plan(cores(), {}, TINY)
        after = replan(before, cores(), {}, TINY | {"tpot_target_s": 0.1})
        assert after.plans == before.plans
        assert changes(before, after) == ["model tiny has other targets."]
        assert changes(before, before) == []

    def test_what_does_not_fit_beside_what_runs_is_refused(self) -> None:
        before = plan(h100s(), LARGE | {"replicas": 3}, SMALL | {"replicas": 2})
        with pytest.raises(ConfigError, match="need 9 GPUs, this node has 8"):
            replan(before, h100s(), LARGE | {"replicas": 3}, SMALL | {"replicas": 2}, EMBED)
        after = replan(before, h100s(), LARGE | {"replicas": 3}, EMBED)
        assert numbers(after) == {"large": 3, "embed": 2}


def test_the_documents_example_fits_eight_gpus() -> None:
    """As `docs/models.md` has it, and what it says of one that does not fit."""
    text = (Path(__file__).parents[3] / "docs/models.md").read_text()
    block = re.search(r"```yaml\n(# Three models.*?)```", text, re.S)
    assert block is not None
    args = yaml.safe_load(block[1])["applications"][0]["args"]
    planned = plan_service(parse(args), h100s())
    assert numbers(planned) == {"large": 2, "small": 3, "embed": 1}
    args["models"][2]["replicas"] = 5
    with pytest.raises(ConfigError) as error:
        plan_service(parse(args), h100s())
    assert f"headway: {error.value}\n" in text


def test_deployments_have_names_of_their_own() -> None:
    assert deployment_name("qwen3-8b") == "Engine-qwen3-8b"
    names = {deployment_name(each) for each in ("a/b", "a-b", "a b", "a_b")}
    assert len(names) == 4
    assert all(each.replace("-", "").replace("_", "").isalnum() for each in names)
