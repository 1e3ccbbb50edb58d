"""Which engines run where?

The plan is for one node. It follows from configuration and hardware alone; from the machine
nothing is read but the size of a model in local files, and the names of vLLM's arguments.

An engine is one Ray actor. With tensor parallelism it has all its GPUs, and
vLLM assigns them to its own processes. Ray never splits one actor's
resources over nodes, so the GPUs of an engine are always on one node and no
placement group is needed.
"""

from dataclasses import dataclass
from typing import Any, Literal

from router.simulation.engine.profile import Profile
from serving.capacity.profiles import DEFAULT_PROFILE, ProfileError, load_profile
from serving.config import Config, ConfigError
from serving.planning.bundled_model import SERVED_MODEL_NAME
from serving.planning.engine_arguments import check_engine_arguments
from serving.planning.gateways import (
    CORE_ENGINES_PER_GATEWAY,
    ENGINES_PER_GATEWAY,
    plan_gateways,
)
from serving.planning.hardware import Hardware
from serving.planning.memory import check_gpu_memory, plan_cpu_memory
from serving.planning.model_size import BUNDLED_MODEL_SIZE, ModelSize, find_model_size

_MAX_CPU_MODEL_LEN = 4096  # tokens; prefilling these takes one core about 15 s (SmolLM2)
_GATEWAY_CPUS = 0.1  # logical CPUs, for placement only; a gateway uses what it needs
_NOBODY = "stand-in"  # what is served by an engine of somebody else's that has no model
_HEADWAY_KEYS = {  # by names in engine.args that Headway has keys of its own for
    "model": "model",
    "served_model_name": "served_model_name",
    "tensor_parallel_size": "tensor_parallel_size",
    "data_parallel_size": "replicas",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What starts where, and why."""

    device: Literal["cuda", "cpu"]
    device_name: str  # of one engine, for people
    model: str | None  # None: the bundled model, or an engine that needs none
    served_model_name: str
    aliases: tuple[str, ...]  # further names of the same model
    num_replicas: int
    num_gpus_per_replica: int
    num_gateways: int
    engine_actor_options: dict[str, Any]  # Ray's, of each engine
    gateway_actor_options: dict[str, Any]
    engine_args: dict[str, Any]  # vLLM's, including those of the user
    num_kv_bytes: int | None  # KV cache per engine; None: vLLM fills the GPU's share
    num_engine_bytes: int | None  # memory per engine, KV cache included; None: not known
    weights_are: Literal["known", "guessed", "unknown"]  # in the latter
    uses_bundled_model: bool
    why: tuple[str, ...]  # sentences
    warnings: tuple[str, ...] = ()  # sentences
    deployment: str = "Engine"  # the engines', by the name that Ray Serve has for them
    first_core: int = 0  # of those that the engines count off, on a CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one of several models has of the machine: `serving.planning.service_plan`."""

    num_gateways: int  # of the service
    engine_cpus: float  # logical ones, of each engine
    gateway_cpus: float
    because: str = ""  # its number of engines
    num_other_bytes: int = 0  # of RAM, that the other models' engines take


def make_plan(
    config: Config, hardware: Hardware, size: ModelSize | None = None, share: Share | None = None
) -> Plan:
    """Return where the engines of one model run; raise `ConfigError` if they cannot.

    The error names the key. `size` is that of the model if it is not given. With a `share`, which
    is one of several models', its number of engines is decided, and `hardware` has the GPUs that
    are its own.
    """
    check_keys(config)
    if size is None:
        size = size_of(config)
    on_gpu = find_device(config, hardware) == "cuda"
    return (_plan_gpus if on_gpu else _plan_cores)(config, hardware, size, share)


def check_keys(config: Config) -> None:
    """Raise `ConfigError` for what no engine can be started with, anywhere."""
    for key, ours in _HEADWAY_KEYS.items():
        if key in config.engine.args:
            raise ConfigError(f"engine.args.{key}: set `{ours}` instead")
    if config.engine.is_vllm:
        check_engine_arguments(config.engine.args)
    if config.max_replicas != "auto" and config.max_replicas < 1:
        raise ConfigError(
            f"replicas: {config.max_replicas} engines cannot serve; set 1 or more, or auto"
        )


def size_of(config: Config) -> ModelSize | None:
    """Return the size of the configuration's model, as far as it is known."""
    if config.model:
        return find_model_size(config.model)
    return BUNDLED_MODEL_SIZE if config.engine.is_vllm else None


def find_device(config: Config, hardware: Hardware) -> Literal["cuda", "cpu"]:
    """Return where a model's engines run. Raise `ConfigError` if they cannot run there."""
    device: Literal["cuda", "cpu"]
    if config.device == "cpu" or (config.device == "auto" and not config.engine.is_vllm):
        device = "cpu"
    elif hardware.gpu_error:
        raise ConfigError(
            f"device: the NVIDIA driver does not work ({hardware.gpu_error}); "
            "repair it, or set device to cpu"
        )
    elif hardware.gpus:
        device = "cuda"
    elif config.device == "cuda":
        raise ConfigError(
            "device: no NVIDIA GPU is visible here (driver? CUDA_VISIBLE_DEVICES?); "
            "set device to cpu or auto"
        )
    else:
        device = "cpu"
    if config.engine.is_vllm and hardware.vllm_build not in ("", device):
        raise ConfigError(
            f"device: {device} it would be, but the vLLM installed here is built for "
            f"{hardware.vllm_build}; install the other one, or set device to {hardware.vllm_build}"
        )
    return device


def gpus_per_engine(config: Config) -> int:
    """Return how many GPUs an engine takes. Raise `ConfigError` for a size that is none."""
    return config.tensor_parallel_size * _pipeline(config)


def cores_per_gpu_engine(num_gpus: int) -> int:
    """Return how many cores an engine on so many GPUs keeps busy.

    One for the replica's process, one for vLLM's engine core, and a worker for each GPU if there
    are several.
    """
    return 2 + (num_gpus if num_gpus > 1 else 0)


def _plan_gpus(
    config: Config, hardware: Hardware, size: ModelSize | None, share: Share | None
) -> Plan:
    if config.model is None and config.engine.is_vllm:
        raise ConfigError(
            f"model: name the model to serve, as there are GPUs here ({_gpu_names(hardware)}); "
            "for the small bundled model set device to cpu"
        )
    num_gpus = len(hardware.gpus)
    tensor, pipeline = config.tensor_parallel_size, _pipeline(config)
    per_replica = gpus_per_engine(config)
    sizes = f"tensor_parallel_size {tensor}" + (
        f" × pipeline_parallel_size {pipeline}" if pipeline > 1 else ""
    )
    if per_replica > num_gpus:
        raise ConfigError(
            f"tensor_parallel_size: one engine with {sizes} needs {_counted(per_replica, 'GPU')}, "
            f"this node has {num_gpus}: lower tensor_parallel_size"
        )
    if config.max_replicas == "auto":
        replicas = num_gpus // per_replica
        because = f"{_counted(num_gpus, 'GPU')} here, {per_replica} per engine"
    else:
        replicas = config.max_replicas
        because = share.because if share is not None else "replicas is set"
    if replicas * per_replica > num_gpus:
        raise ConfigError(
            f"replicas: {replicas} × {sizes} need {_counted(replicas * per_replica, 'GPU')}, "
            f"this node has {num_gpus}: lower replicas or tensor_parallel_size"
        )
    heads = size.num_attention_heads if size else None
    if heads and heads % tensor:
        raise ConfigError(
            f"tensor_parallel_size: the model's {heads} attention heads do not divide by {tensor}"
        )
    engine_args = {
        "tensor_parallel_size": tensor,
        "gpu_memory_utilization": 0.9,
        **config.engine.args,
    }
    used = hardware.gpus[: replicas * per_replica]
    why = [f"{_counted(replicas, 'engine')} of {_counted(per_replica, 'GPU')}: {because}."]
    sentences, warnings = check_gpu_memory(engine_args, used, per_replica, size)
    why += sentences
    if idle := num_gpus - len(used):
        why.append(f"{_counted(idle, 'GPU')} stay{'s' if idle == 1 else ''} idle.")
    if tensor > 1 and not all(gpu.num_nvlinks for gpu in used):
        why.append("No NVLink found: tensor parallelism goes over PCIe.")
    if len({gpu.name for gpu in used}) > 1:
        warnings.append("The GPUs differ; set CUDA_DEVICE_ORDER=PCI_BUS_ID for a stable order.")
    if any(gpu.mig for gpu in used):
        warnings.append("A GPU is split by MIG: name the instance in CUDA_VISIBLE_DEVICES.")
    if share is None:
        cores_per_engine = cores_per_gpu_engine(per_replica)
        share, sentences = _whole(config, replicas, hardware, cores_per_engine, ENGINES_PER_GATEWAY)
        why += sentences
    return Plan(
        device="cuda",
        device_name=(f"{per_replica} × " if per_replica > 1 else "") + used[0].name,
        model=config.model,
        served_model_name=next(iter(config.served_names), config.model or _NOBODY),
        aliases=config.served_names[1:],
        num_replicas=replicas,
        num_gpus_per_replica=per_replica,
        num_gateways=share.num_gateways,
        engine_actor_options={"num_cpus": share.engine_cpus, "num_gpus": per_replica},
        gateway_actor_options={"num_cpus": share.gateway_cpus},
        engine_args=engine_args,
        num_kv_bytes=config.engine.args.get("kv_cache_memory_bytes"),
        num_engine_bytes=None,
        weights_are=_weights_are(size),
        uses_bundled_model=False,
        why=tuple(why),
        warnings=tuple(warnings),
    )


def core_engine_arguments(
    config: Config, hardware: Hardware, size: ModelSize | None
) -> tuple[dict[str, Any], ModelSize | None]:
    """Return vLLM's arguments of an engine on one core, and the model's size by their dtype."""
    dtype = "bfloat16" if hardware.has_bfloat16 else "float32"
    engine_args: dict[str, Any] = {"dtype": dtype, "block_size": 32}
    # A long prompt gets half of these: steps of about 0.25 s at 1.7 ms per
    # token, of which the fixed 40 ms of a step are a small part. With more tokens prefill would
    # hardly be faster, and requests that arrive during a step would wait longer.
    engine_args["max_num_batched_tokens"] = 256
    engine_args["long_prefill_token_threshold"] = 128
    # Inductor's CPU code gave wrong text for SmolLM2 (vLLM 0.32, AVX-512 BF16:
    # "L'Étoile, la Marseillaise" for the capital of France) and takes a minute to build.
    engine_args["enforce_eager"] = True
    trained_len = size.max_model_len if size else None
    # With -1 vLLM chooses the longest that the KV cache holds.
    unknown_len = -1 if config.engine.is_vllm else _MAX_CPU_MODEL_LEN
    engine_args["max_model_len"] = min(_MAX_CPU_MODEL_LEN, trained_len or unknown_len)
    engine_args |= config.engine.args
    if size is not None and engine_args["dtype"] in ("float32", "float"):
        size = size.in_float32()
    return engine_args, size


def _plan_cores(
    config: Config, hardware: Hardware, size: ModelSize | None, share: Share | None
) -> Plan:
    if config.tensor_parallel_size > 1:
        raise ConfigError(
            f"tensor_parallel_size: {config.tensor_parallel_size} needs GPUs; "
            "leave it at 1 on a CPU, where each engine has one core"
        )
    num_cores = len(hardware.cores)
    replicas = min(2, num_cores) if config.max_replicas == "auto" else config.max_replicas
    trained_len = size.max_model_len if size else None
    engine_args, size = core_engine_arguments(config, hardware, size)
    num_engine_bytes = num_kv_bytes = None
    why: list[str] = []
    warnings: list[str] = []
    if config.engine.is_vllm:
        if not hardware.has_bfloat16:
            # Measured on a Zen 3 core (SmolLM2, 256 tokens times a layer's weights): float32 gives
            # 7 times the products per second; for whole prompts the ratio is larger.
            why.append(
                "This CPU has no bfloat16 instructions and would take several times as long "
                "with it as with float32 (engine.args.dtype)."
            )
        free_bytes = hardware.num_free_ram_bytes
        num_other_bytes = share.num_other_bytes if share is not None else 0
        memory = plan_cpu_memory(config, engine_args, free_bytes, replicas, size, num_other_bytes)
        replicas = memory.num_replicas
        num_kv_bytes, num_engine_bytes = memory.num_kv_bytes, memory.num_engine_bytes
        engine_args["kv_cache_memory_bytes"] = num_kv_bytes
        why += memory.why
        warnings += memory.warnings
    emulated = _emulated(config)
    what = f"emulating {emulated.device} by profile {emulated.name}" if emulated else "of one core"
    why.insert(
        0,
        f"{_counted(replicas, 'engine')} {what}: "
        + (
            f"{_counted(num_cores, 'core')} here, and two engines suffice to show routing."
            if config.max_replicas == "auto"
            else f"{share.because if share is not None else 'replicas is set'}."
        ),
    )
    if (
        config.engine.is_vllm
        and trained_len
        and engine_args["max_model_len"] == _MAX_CPU_MODEL_LEN < trained_len
    ):
        why.append(
            f"Contexts of {_MAX_CPU_MODEL_LEN} tokens of the model's {trained_len}: a longer "
            "prompt would hold its engine for half a minute and more (engine.args.max_model_len)."
        )
    if config.engine.is_vllm and replicas > num_cores:
        warnings.append(
            f"{_counted(replicas, 'engine')} share {_counted(num_cores, 'core')}: steps will "
            "stretch many times over; lower replicas."
        )
    if share is None:
        per_gateway = CORE_ENGINES_PER_GATEWAY if config.engine.is_vllm else ENGINES_PER_GATEWAY
        share, sentences = _whole(config, replicas, hardware, 1, per_gateway)
        why += sentences
    uses_bundled_model = config.model is None and config.engine.is_vllm
    return Plan(
        device="cpu",
        device_name=(
            f"emulated {emulated.device}" if emulated else f"{hardware.cpu_name or 'CPU'}, 1 core"
        ),
        model=config.model,
        served_model_name=next(
            iter(config.served_names),
            config.model
            or (
                SERVED_MODEL_NAME if uses_bundled_model else emulated.model if emulated else _NOBODY
            ),
        ),
        aliases=config.served_names[1:],
        num_replicas=replicas,
        num_gpus_per_replica=0,
        num_gateways=share.num_gateways,
        engine_actor_options={"num_cpus": share.engine_cpus, "num_gpus": 0},
        gateway_actor_options={"num_cpus": share.gateway_cpus},
        engine_args=dict(config.engine.args) if emulated else engine_args,
        num_kv_bytes=num_kv_bytes,
        num_engine_bytes=num_engine_bytes,
        weights_are=_weights_are(size),
        uses_bundled_model=uses_bundled_model,
        why=tuple(why),
        warnings=tuple(warnings),
    )


def _whole(
    config: Config, replicas: int, hardware: Hardware, cores_per_engine: int, per_gateway: int
) -> tuple[Share, list[str]]:
    """Return the share of a model that is the only one, and sentences about its gateways."""
    num_cores = len(hardware.cores)
    num_gateways, why = plan_gateways(
        config, replicas, num_cores, cores_per_engine=cores_per_engine, per_gateway=per_gateway
    )
    engine_cpus, gateway_cpus = logical_cpus(num_cores, replicas, num_gateways)
    return Share(num_gateways=num_gateways, engine_cpus=engine_cpus, gateway_cpus=gateway_cpus), why


def _emulated(config: Config) -> Profile | None:
    """Return what emulated engines stand for; None for others. Raise `ConfigError` if unknown."""
    if not config.engine.is_emulated:
        return None
    try:
        return load_profile(config.engine.args.get("profile", DEFAULT_PROFILE))
    except ProfileError as error:
        raise ConfigError(f"engine.args.profile: {error}") from None


def _weights_are(size: ModelSize | None) -> Literal["known", "guessed", "unknown"]:
    if size is None or not size.num_weight_bytes:
        return "unknown"
    return "guessed" if size.is_guess else "known"


def _pipeline(config: Config) -> int:
    value = config.engine.args.get("pipeline_parallel_size", 1)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"engine.args.pipeline_parallel_size: {value!r} is not a count")
    return value


def logical_cpus(num_cores: int, replicas: int, num_gateways: int) -> tuple[float, float]:
    """Return the logical CPUs of an engine and of a gateway, for Ray's placement.

    They are chosen so that all actors fit into a Ray that counts just the real cores, as plain
    `serve run` starts it. Serve's controller and proxies ask for none.
    """
    gateway = min(_GATEWAY_CPUS, num_cores / 4 / num_gateways)
    share = (num_cores - gateway * num_gateways) / replicas
    # Ray counts in 1/10,000 and takes no fractions above one.
    return min(1.0, int(share * 1000) / 1000), int(gateway * 10_000) / 10_000


def _gpu_names(hardware: Hardware) -> str:
    names = [gpu.name for gpu in hardware.gpus]
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
