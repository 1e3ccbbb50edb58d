"""How many engines fit into memory, and with how much KV cache?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serving.config import Config, ConfigError, EngineConfig
from serving.planning.hardware import Gpu
from serving.planning.model_size import ModelSize

_MIB = 1 << 20
_GIB = 1 << 30

# Per engine on a CPU, without weights and KV cache: two Python processes with
# torch and vLLM. Measured with SmolLM2-135M on one core (vLLM 0.32): 2.65 GiB in all,
# of which 1 GiB is KV cache and 0.5 GiB twice the weights. That leaves 1.2 GiB; the
# rest of the 1.8 is for the API layer, the Ray worker and a margin.
_CPU_ENGINE_BYTES = int(1.8 * _GIB)
_WEIGHT_COPIES = 2  # the file's pages and the tensors, while loading
_CONTROL_BYTES = int(1.2 * _GIB)  # Ray's processes, Serve's controller, one gateway
_KV_BYTES = _GIB  # per engine: 46,000 tokens of SmolLM2
_MIN_KV_BYTES = 64 * _MIB
_KV_STEP_BYTES = 64 * _MIB
# What an engine core may take once it is ready: of RAM, all engines together, but not so little
# that a long prompt would be taken for a leak. SmolLM2's took 57 MiB (prompts of 1,900 tokens, 32
# requests at once, log probabilities); its KV cache is whole from the start.
_GROWTH_SHARE = 1 / 8
_MIN_GROWTH_BYTES = _GIB
_MAX_WEIGHTS_SHARE = 0.95  # of what vLLM may use of a GPU; activations and KV need the rest


@dataclass(frozen=True, slots=True)
class CpuMemory:
    """How many engines run, and the memory of each."""

    num_replicas: int
    num_kv_bytes: int  # per engine
    num_engine_bytes: int  # per engine, KV cache included
    why: tuple[str, ...]  # sentences
    warnings: tuple[str, ...]  # sentences


def plan_cpu_memory(
    config: Config,
    engine_args: dict[str, Any],
    num_free_bytes: int,
    replicas: int,
    size: ModelSize | None,
) -> CpuMemory:
    """Return what fits into `num_free_bytes` of RAM; raise `ConfigError` if nothing does.

    If memory is short the KV cache shrinks first, down to one request of full length; then,
    with `replicas` on auto, the number of engines.
    """
    wanted = engine_args.get("kv_cache_memory_bytes")
    if wanted is not None and (not isinstance(wanted, int) or wanted <= 0):
        raise ConfigError(f"engine.args.kv_cache_memory_bytes: {wanted!r} is not a count of bytes")
    smallest = wanted or _smallest_kv(engine_args["max_model_len"], size)
    room = num_free_bytes - _CONTROL_BYTES
    counts = [replicas, 1] if config.max_replicas == "auto" else [replicas]
    weights = _WEIGHT_COPIES * size.num_weight_bytes if size else 0
    tries = [(count, weights) for count in counts]
    if size and size.is_guess:
        tries.append((counts[-1], 0))  # for a guess nothing is refused
    for count, need in tries:
        base = _CPU_ENGINE_BYTES + need
        kv = wanted or min(max(_KV_BYTES, smallest), room // count - base)
        if kv >= smallest and count * (base + kv) <= room:
            break
    else:
        raise _memory_error(config, count, base, smallest, num_free_bytes, bool(wanted))
    if not wanted:
        kv = max(smallest, kv // _KV_STEP_BYTES * _KV_STEP_BYTES)
    num_engine_bytes = _CPU_ENGINE_BYTES + weights + kv
    why = [
        f"Each engine takes about {_gib(num_engine_bytes)}, {_gib(kv)} of it KV cache"
        + _weights_text(size)
        + f"; {_gib(num_free_bytes)} of RAM are free."
    ]
    if count < replicas:
        why.append(f"Memory holds {count} of {replicas} engines.")
    if not wanted and kv < _KV_BYTES:
        why.append(f"The KV cache is below {_gib(_KV_BYTES)} because memory is short.")
    warnings = []
    if need < weights:
        warnings.append(
            f"If the model is as large as its name says, it does not fit: {count} × "
            f"{_gib(num_engine_bytes)} and {_gib(_CONTROL_BYTES)} for Ray are more than the "
            f"{_gib(num_free_bytes)} that are free."
        )
    elif size is None or not size.num_weight_bytes:
        warnings.append(
            "How large the model is, is not known before it has been downloaded: "
            "whether its weights fit into memory will show when engines load it."
        )
    return CpuMemory(count, kv, num_engine_bytes, tuple(why), tuple(warnings))


def _weights_text(size: ModelSize | None) -> str:
    if size is None or not size.num_weight_bytes:
        return ", and the model's weights, whose size is not known yet"
    if size.is_guess:
        return f", with {_gib(size.num_weight_bytes)} of weights, guessed by the model's name"
    return ""


def growth_allowed(config: EngineConfig, num_ram_bytes: int, num_replicas: int) -> int | None:
    """Return the bytes that an engine core may take after it is ready; None for no bound."""
    if config.max_growth_bytes == "auto":
        return max(_MIN_GROWTH_BYTES, int(_GROWTH_SHARE * num_ram_bytes / num_replicas))
    return config.max_growth_bytes


def _smallest_kv(max_model_len: Any, size: ModelSize | None) -> int:
    """Return the bytes of KV cache for one request of full length, which vLLM insists on."""
    if size is None or size.num_kv_bytes_per_token is None or not isinstance(max_model_len, int):
        return _MIN_KV_BYTES
    return max(_MIN_KV_BYTES, max_model_len * size.num_kv_bytes_per_token)


def _memory_error(
    config: Config, replicas: int, base: int, kv: int, num_free_bytes: int, kv_is_set: bool
) -> ConfigError:
    needed = replicas * (base + kv) + _CONTROL_BYTES
    if kv_is_set:
        key, advice = "engine.args.kv_cache_memory_bytes", "lower it"
    elif replicas > 1:
        key, advice = "replicas", "lower it"
    else:
        key, advice = "model", "choose a smaller one" if config.model else "this is the smallest"
    return ConfigError(
        f"{key}: not enough memory: {replicas} × {_gib(base + kv)} "
        f"(KV cache {_gib(kv)} of it) and {_gib(_CONTROL_BYTES)} for Ray are "
        f"{_gib(needed)}, {_gib(num_free_bytes)} are free: {advice}, or free memory"
    )


def check_gpu_memory(
    engine_args: dict[str, Any], gpus: Sequence[Gpu], per_replica: int, size: ModelSize | None
) -> tuple[list[str], list[str]]:
    """Return sentences about GPU memory, and warnings of it.

    Raise `ConfigError` if an engine could not start.
    """
    share = engine_args["gpu_memory_utilization"]
    if not isinstance(share, int | float) or not 0 < share <= 1:
        raise ConfigError(f"engine.args.gpu_memory_utilization: {share!r} is not between 0 and 1")
    explicit_kv = "kv_cache_memory_bytes" in engine_args  # then vLLM ignores the share
    for gpu in gpus:
        if not explicit_kv and gpu.num_free_bytes < share * gpu.num_bytes:
            raise ConfigError(
                f"engine.args.gpu_memory_utilization: GPU {gpu.index} has "
                f"{_gib(gpu.num_free_bytes)} of {_gib(gpu.num_bytes)} free, {share} of it are "
                "asked for: lower it, or end what else runs on that GPU"
            )
    budget = min(gpu.num_bytes for gpu in gpus) * (1 if explicit_kv else share)
    if size is None or not size.num_weight_bytes:
        return [f"vLLM fills {share:.0%} of each GPU; the model's size is not known yet."], []
    weights = size.num_weight_bytes / per_replica
    too_large = (
        f"tensor_parallel_size: the weights are {_gib(size.num_weight_bytes)}, "
        f"{_gib(weights)} on each of {per_replica} GPU{'s' if per_replica > 1 else ''}, of "
        f"which vLLM may use {_gib(budget)}: raise tensor_parallel_size"
    )
    if weights <= _MAX_WEIGHTS_SHARE * budget:
        guess = " (guessed by the model's name)" if size.is_guess else ""
        return [
            f"Weights take {_gib(weights)} of each GPU{guess}, and of the {_gib(budget)} that "
            "vLLM may use the rest goes to activations and KV cache."
        ], []
    if not size.is_guess:
        raise ConfigError(too_large)
    return [], [f"If the model is as large as its name says: {too_large}."]


def _gib(num_bytes: float) -> str:
    if num_bytes < _GIB:
        return f"{num_bytes / _MIB:.0f} MiB"
    return f"{num_bytes / _GIB:.1f} GiB"
