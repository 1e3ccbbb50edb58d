"""Plans for hardware that this machine need not have."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from serving.config import ConfigError, parse
from serving.planning.hardware import Gpu, Hardware
from serving.planning.model_size import BUNDLED_MODEL_SIZE, ModelSize, read_model_size
from serving.planning.plan import Plan, make_plan

GIB = 1 << 30


def gpu_node(num_gpus: int = 8, num_gib: int = 80, num_free_gib: int = 79) -> Hardware:
    gpus = tuple(
        Gpu(i, "NVIDIA H100 80GB HBM3", num_gib * GIB, num_free_gib * GIB, "9.0", 18)
        for i in range(num_gpus)
    )
    return Hardware(
        cores=tuple(range(64)),
        num_ram_bytes=512 * GIB,
        num_free_ram_bytes=500 * GIB,
        gpus=gpus,
        vllm_build="cuda",
    )


def laptop(num_cores: int = 2, num_free_gib: float = 20) -> Hardware:
    free = int(num_free_gib * GIB)
    return Hardware(
        cores=tuple(range(num_cores)),
        num_ram_bytes=free,
        num_free_ram_bytes=free,
        cpu_name="CPU",
        vllm_build="cpu",
    )


def make(hardware: Hardware, size: ModelSize | None = None, **args: Any) -> Plan:
    return make_plan(parse(args), hardware, size)


def logical_cpus(plan: Plan, num_gateways: int = 1) -> float:
    return (
        plan.num_replicas * plan.engine_actor_options["num_cpus"]
        + num_gateways * plan.gateway_actor_options["num_cpus"]
    )


class TestOnCpu:
    def test_two_engines_with_the_bundled_model(self) -> None:
        plan = make(laptop())
        assert (plan.device, plan.num_replicas, plan.model) == ("cpu", 2, None)
        assert plan.uses_bundled_model
        assert plan.served_model_name == "SmolLM2-135M-Instruct"
        assert plan.engine_args == {
            "dtype": "bfloat16",
            "block_size": 32,
            "max_num_batched_tokens": 256,
            "max_model_len": 4096,
            "enforce_eager": True,
            "kv_cache_memory_bytes": GIB,
        }

    @pytest.mark.parametrize("num_cores", [1, 2, 3, 16])
    @pytest.mark.parametrize("num_gateways", [1, 2, 9])
    @pytest.mark.parametrize("replicas", ["auto", 1, 3])
    def test_all_actors_fit_a_ray_that_counts_real_cores(
        self, num_cores: int, num_gateways: int, replicas: Any
    ) -> None:
        plan = make(laptop(num_cores), replicas=replicas, gateway={"replicas": num_gateways})
        assert logical_cpus(plan, num_gateways) <= num_cores + 1e-9
        assert plan.engine_actor_options["num_cpus"] > 0

    def test_without_bfloat16_instructions_it_is_float32_and_twice_the_memory(self) -> None:
        old = dataclasses.replace(laptop(), has_bfloat16=False)
        size = ModelSize(GIB, 32768, 1 << 20)
        args = {"engine": {"args": {"max_model_len": 3000}}, "replicas": 1, "model": "m"}
        plan = make(old, size, **args)
        assert plan.engine_args["dtype"] == "float32"
        assert plan.num_kv_bytes == 3000 << 21
        assert any("engine.args.dtype" in sentence for sentence in plan.why)
        args["engine"]["args"]["dtype"] = "bfloat16"
        assert make(old, size, **args).num_kv_bytes == 3000 << 20

    def test_further_served_names_are_aliases(self) -> None:
        plan = make(laptop(), served_model_name=["small", "smollm", "default"])
        assert plan.served_model_name == "small"
        assert plan.aliases == ("smollm", "default")
        assert make(laptop(), served_model_name="small").aliases == ()

    def test_arguments_of_the_user_win(self) -> None:
        args = {"block_size": 16, "max_model_len": 1024, "kv_cache_memory_bytes": GIB // 2}
        plan = make(laptop(), engine={"args": {**args, "seed": 7}})
        assert plan.engine_args.items() >= {**args, "seed": 7}.items()
        assert plan.num_kv_bytes == GIB // 2

    def test_the_kv_cache_shrinks_before_an_engine_goes(self) -> None:
        shrunk = make(laptop(num_free_gib=7))
        assert shrunk.num_replicas == 2
        assert shrunk.num_kv_bytes is not None
        assert 64 << 20 < shrunk.num_kv_bytes < GIB
        assert any("KV cache is below" in sentence for sentence in shrunk.why)
        single = make(laptop(num_free_gib=4.5))
        assert single.num_replicas == 1
        assert any("1 of 2 engines" in sentence for sentence in single.why)

    def test_the_kv_cache_holds_one_request_of_full_length(self) -> None:
        size = ModelSize(GIB, 32768, 1 << 20)
        args = {"engine": {"args": {"max_model_len": 3000}}, "replicas": 1, "model": "m"}
        assert make(laptop(), size, **args).num_kv_bytes == 3000 << 20

    @pytest.mark.parametrize(
        ("num_free_gib", "args", "key"),
        [
            (2, {}, "model:"),
            (7, {"replicas": 4}, "replicas:"),
            (
                7,
                {"engine": {"args": {"kv_cache_memory_bytes": 30 * GIB}}},
                "engine.args.kv_cache_memory_bytes:",
            ),
        ],
    )
    def test_too_little_memory_tells_needed_and_free(
        self, num_free_gib: float, args: dict[str, Any], key: str
    ) -> None:
        with pytest.raises(ConfigError, match="not enough memory") as error:
            make(laptop(num_free_gib=num_free_gib), **args)
        assert str(error.value).startswith(key)
        assert f"{num_free_gib}.0 GiB are free" in str(error.value)

    def test_more_engines_than_cores_is_allowed_and_warned_of(self) -> None:
        assert "share 2 cores" in make(laptop(), replicas=3).warnings[0]

    def test_a_stand_in_engine_needs_neither_model_nor_memory(self) -> None:
        plan = make(laptop(num_free_gib=0.5), engine={"factory": "a.b:C"}, replicas=5)
        assert (plan.num_replicas, plan.uses_bundled_model) == (5, False)
        assert plan.num_engine_bytes is None
        assert make(gpu_node(), engine={"factory": "a.b:C"}).device == "cpu"

    def test_tensor_parallelism_needs_gpus(self) -> None:
        with pytest.raises(ConfigError, match=r"^tensor_parallel_size: 2 needs GPUs"):
            make(laptop(), tensor_parallel_size=2)

    def test_cpu_can_be_asked_for_beside_gpus(self) -> None:
        hardware = dataclasses.replace(gpu_node(), vllm_build="cpu")
        assert make(hardware, device="cpu").engine_actor_options["num_gpus"] == 0


class TestOnGpu:
    @pytest.mark.parametrize(("tensor", "replicas"), [(1, 8), (2, 4), (4, 2), (8, 1), (3, 2)])
    def test_auto_takes_all_gpus(self, tensor: int, replicas: int) -> None:
        plan = make(gpu_node(), model="a/b", tensor_parallel_size=tensor)
        assert (plan.device, plan.num_replicas) == ("cuda", replicas)
        assert plan.num_gpus_per_replica == tensor
        assert plan.engine_actor_options["num_gpus"] == tensor
        assert plan.engine_args["tensor_parallel_size"] == tensor
        assert plan.engine_args["gpu_memory_utilization"] == 0.9
        assert logical_cpus(plan) <= 64

    def test_pipeline_stages_take_gpus_too(self) -> None:
        plan = make(gpu_node(), model="a/b", engine={"args": {"pipeline_parallel_size": 4}})
        assert (plan.num_replicas, plan.num_gpus_per_replica) == (2, 4)

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (
                {"model": "m", "replicas": 9},
                "replicas: 9 × tensor_parallel_size 1 need 9 GPUs, this node has 8: "
                "lower replicas or tensor_parallel_size",
            ),
            (
                {"model": "m", "tensor_parallel_size": 16},
                "tensor_parallel_size: one engine with tensor_parallel_size 16 needs 16 GPUs, "
                "this node has 8: lower tensor_parallel_size",
            ),
            ({}, "model: name the model to serve"),
            ({"model": "m", "replicas": 0}, "replicas: 0 engines cannot serve"),
            (
                {"model": "m", "engine": {"args": {"tensor_parallel_size": 2}}},
                "engine.args.tensor_parallel_size: set `tensor_parallel_size` instead",
            ),
            (
                {"model": "m", "engine": {"args": {"gpu_memory_utilization": 9}}},
                "engine.args.gpu_memory_utilization: 9 is not between 0 and 1",
            ),
        ],
    )
    def test_what_does_not_fit_names_the_key(self, args: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError) as error:
            make(gpu_node(), **args)
        assert str(error.value).startswith(message)

    def test_weights_must_fit_their_share(self) -> None:
        size = ModelSize(140 * GIB, num_attention_heads=64)
        with pytest.raises(ConfigError, match=r"^tensor_parallel_size: the weights are 140\.0 GiB"):
            make(gpu_node(), size, model="m")
        assert make(gpu_node(), size, model="m", tensor_parallel_size=4).num_replicas == 2

    def test_heads_must_divide(self) -> None:
        with pytest.raises(ConfigError, match="9 attention heads do not divide by 2"):
            make(gpu_node(), BUNDLED_MODEL_SIZE, model="m", tensor_parallel_size=2)

    def test_a_gpu_in_use_is_named(self) -> None:
        gpus = list(gpu_node().gpus)
        gpus[3] = dataclasses.replace(gpus[3], num_free_bytes=20 * GIB)
        hardware = dataclasses.replace(gpu_node(), gpus=tuple(gpus))
        with pytest.raises(ConfigError, match=r"gpu_memory_utilization: GPU 3 has 20\.0 GiB"):
            make(hardware, model="m")
        assert make(hardware, model="m", replicas=3).num_replicas == 3

    def test_odd_gpus_are_warned_of(self) -> None:
        gpus = list(gpu_node(2).gpus)
        gpus[1] = dataclasses.replace(gpus[1], name="NVIDIA L4", mig=True)
        warnings = make(dataclasses.replace(gpu_node(), gpus=tuple(gpus)), model="m").warnings
        assert ["differ" in warnings[0], "MIG" in warnings[1]] == [True, True]


class TestDevice:
    def test_a_broken_driver_is_an_error_unless_cpu_is_asked_for(self) -> None:
        hardware = dataclasses.replace(laptop(), gpu_error="Driver Not Loaded")
        with pytest.raises(ConfigError, match=r"^device: .*Driver Not Loaded.* device to cpu"):
            make(hardware)
        assert make(hardware, device="cpu").device == "cpu"

    def test_no_gpu_visible(self) -> None:
        with pytest.raises(ConfigError, match="device: no NVIDIA GPU is visible"):
            make(laptop(), device="cuda")

    def test_the_other_build_of_vllm(self) -> None:
        hardware = dataclasses.replace(gpu_node(), vllm_build="cpu")
        with pytest.raises(ConfigError, match="built for cpu"):
            make(hardware, model="m")


def test_size_of_a_folder(tmp_path: Path) -> None:
    assert read_model_size("org/model") is None
    (tmp_path / "a.safetensors").write_bytes(b"x" * 10)
    (tmp_path / "b.safetensors").write_bytes(b"x" * 5)
    (tmp_path / "config.json").write_text("not json")
    assert read_model_size(str(tmp_path)) == ModelSize(15)
    shape = {
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 30,
        "max_position_embeddings": 8192,
    }
    (tmp_path / "config.json").write_text(json.dumps({"text_config": shape}))
    assert read_model_size(str(tmp_path)) == dataclasses.replace(
        BUNDLED_MODEL_SIZE, num_weight_bytes=15
    )
