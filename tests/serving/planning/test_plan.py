"""Plans for hardware that this machine need not have."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from serving.config import ConfigError, parse
from serving.planning.hardware import Gpu, Hardware
from serving.planning.model_size import BUNDLED_MODEL_SIZE, ModelSize, find_model_size
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
            "long_prefill_token_threshold": 128,
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


class TestModelSize:
    def test_of_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "a.safetensors").write_bytes(b"x" * 10)
        (tmp_path / "b.safetensors").write_bytes(b"x" * 5)
        (tmp_path / "config.json").write_text("not json")
        assert find_model_size(str(tmp_path)) == ModelSize(15)
        shape = {
            "hidden_size": 576,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "num_hidden_layers": 30,
            "max_position_embeddings": 8192,
        }
        (tmp_path / "config.json").write_text(json.dumps({"text_config": shape}))
        assert find_model_size(str(tmp_path)) == dataclasses.replace(
            BUNDLED_MODEL_SIZE, num_weight_bytes=15
        )

    def test_of_a_folder_that_is_still_filled_is_that_of_the_whole(self, tmp_path: Path) -> None:
        (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"x" * 10)
        index = {"metadata": {"total_size": 25}, "weight_map": {}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        assert find_model_size(str(tmp_path)) == ModelSize(25)

    def test_of_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "model.gguf").write_bytes(b"x" * 7)
        assert find_model_size(str(tmp_path / "model.gguf")) == ModelSize(7)

    def test_of_what_was_downloaded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        repository = tmp_path / "models--org--Thing-70B"
        snapshot = repository / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        (snapshot / "model.safetensors").write_bytes(b"x" * 12)
        (snapshot / "config.json").write_text('{"max_position_embeddings": 77}')
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        assert find_model_size("org/Thing-70B") == ModelSize(12, 77)
        (snapshot / "model.safetensors").unlink()
        assert find_model_size("org/Thing-70B") == ModelSize(140 * 10**9, 77, is_guess=True)

    @pytest.mark.parametrize(
        ("name", "num_bytes"),
        [
            ("Qwen/Qwen3-8B", 16e9),
            ("meta-llama/Llama-3.1-70B-Instruct", 140e9),
            ("Qwen/Qwen3-30B-A3B", 60e9),
            ("mistralai/Mixtral-8x7B-v0.1", 112e9),
            ("HuggingFaceTB/SmolLM2-135M-Instruct", 0.27e9),
            ("org/Qwen2.5-0.5b", 1e9),
            ("Qwen/Qwen3-8B-AWQ", 4.5e9),
            ("Qwen/Qwen3-8B-FP8", 8e9),
        ],
    )
    def test_of_a_name(self, name: str, num_bytes: float) -> None:
        assert find_model_size(name) == ModelSize(int(num_bytes), is_guess=True)

    @pytest.mark.parametrize("name", ["org/model", "org/phi-4", "a/bge-m3", "not a name", "x/4k"])
    def test_of_a_name_that_does_not_tell(self, name: str) -> None:
        assert find_model_size(name) is None


class TestUnknownSize:
    def test_weights_that_nobody_knows_are_not_counted_as_nothing(self) -> None:
        plan = make(laptop(), model="org/model")
        assert plan.weights_are == "unknown"
        assert "the model's weights, whose size is not known yet" in plan.why[1]
        assert "not known before it has been downloaded" in plan.warnings[0]

    def test_guessed_weights_are_counted(self) -> None:
        plan = make(laptop(), model="org/Model-1B")
        assert (plan.weights_are, plan.num_replicas, plan.warnings) == ("guessed", 2, ())
        assert plan.num_engine_bytes == pytest.approx(4e9 + 2.8 * GIB)
        assert "guessed by the model's name" in plan.why[1]
        assert make(laptop(num_free_gib=9), model="org/Model-1B").num_replicas == 1

    def test_a_guess_refuses_nothing(self) -> None:
        plan = make(laptop(), model="org/Model-8B")
        assert (plan.num_replicas, plan.num_kv_bytes) == (1, GIB)
        assert plan.num_engine_bytes == pytest.approx(32e9 + 2.8 * GIB)
        assert "it does not fit: 1 × 32.6 GiB and 1.2 GiB for Ray" in plan.warnings[0]
        with pytest.raises(ConfigError, match="not enough memory"):
            make(laptop(num_free_gib=2), model="org/Model-8B")
        with pytest.raises(ConfigError, match="not enough memory"):
            make(laptop(), ModelSize(16 * 10**9), model="org/Model-8B")

    def test_nor_on_a_gpu(self) -> None:
        plan = make(gpu_node(), model="org/Model-72B")
        assert "as large as its name says: tensor_parallel_size: the weights" in plan.warnings[0]
        plan = make(gpu_node(), model="org/Model-32B")
        assert (plan.weights_are, plan.warnings) == ("guessed", ())
        assert "59.6 GiB of each GPU (guessed by the model's name)" in plan.why[1]
