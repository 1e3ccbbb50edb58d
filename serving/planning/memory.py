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
    num_other_bytes: int = 0,
) -> CpuMemory:
    """Return what fits into `num_free_bytes` of RAM; raise `ConfigError` if nothing does.

    If memory is short the KV cache shrinks first, down to one request of full length; then,
    with `replicas` on auto, the number of engines. Other models take `num_other_bytes` of it.
    """
    wanted = _wanted_kv(engine_args)
    smallest = wanted or _smallest_kv(engine_args["max_model_len"], size)
    room = num_free_bytes - _CONTROL_BYTES - num_other_bytes
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
        free = num_free_bytes - num_other_bytes
        raise _memory_error(config, count, base, smallest, free, bool(wanted))
    if not wanted:
        kv = max(smallest, kv // _KV_STEP_BYTES * _KV_STEP_BYTES)
    num_engine_bytes = _CPU_ENGINE_BYTES + weights + kv
    why = [
        f"Each engine takes about {gib(num_engine_bytes)}, {gib(kv)} of it KV cache"
        + _weights_text(size)
        + f"; {gib(num_free_bytes)} of RAM are free"
        + (f", of which other models take {gib(num_other_bytes)}." if num_other_bytes else ".")
    ]
    if count < replicas:
        why.append(f"Memory holds {count} of {replicas} engines.")
    if not wanted and kv < _KV_BYTES:
        why.append(f"The KV cache is below {gib(_KV_BYTES)} because memory is short.")
    warnings = []
    if need < weights:
        warnings.append(
            f"If the model is as large as its name says, it does not fit: {count} × "
            f"{gib(num_engine_bytes)} and {gib(_CONTROL_BYTES)} for Ray are more than the "
            f"{gib(num_free_bytes - num_other_bytes)} that are free."
        )
    elif size is None or not size.num_weight_bytes:
        warnings.append(
            "How large the model is, is not known before it has been downloaded: "
            "whether its weights fit into memory will show when engines load it."
        )
    return CpuMemory(count, kv, num_engine_bytes, tuple(why), tuple(warnings))


@dataclass(frozen=True, slots=True)
class EngineNeed:
    """What an engine on a CPU takes of RAM, bytes."""

    num_base_bytes: int  # without its KV cache
    num_smallest_kv_bytes: int  # without which it does not start
    num_wanted_kv_bytes: int

    @property
    def num_smallest_bytes(self) -> int:
        """The least that it starts with."""
        return self.num_base_bytes + self.num_smallest_kv_bytes


def engine_need(engine_args: dict[str, Any], size: ModelSize | None) -> EngineNeed:
    """Return what an engine takes. Nothing is kept for weights whose size is only guessed."""
    wanted = _wanted_kv(engine_args)
    smallest = wanted or _smallest_kv(engine_args["max_model_len"], size)
    weights = size.num_weight_bytes if size is not None and not size.is_guess else 0
    return EngineNeed(
        _CPU_ENGINE_BYTES + _WEIGHT_COPIES * weights, smallest, wanted or max(_KV_BYTES, smallest)
    )


def share_memory(
    needs: Sequence[tuple[int, EngineNeed]], num_free_bytes: int
) -> tuple[list[int], int]:
    """Return the RAM of each model's engines together, and the bytes that are lacking.

    `needs`: each model's engines, and what one of them takes. If memory is short all KV caches
    shrink, by the same share of what they could do without.
    """
    room = num_free_bytes - _CONTROL_BYTES
    smallest = sum(number * need.num_smallest_bytes for number, need in needs)
    more = [need.num_wanted_kv_bytes - need.num_smallest_kv_bytes for _, need in needs]
    most = sum(number * each for (number, _), each in zip(needs, more, strict=True))
    share = min(1.0, max(0.0, (room - smallest) / most)) if most else 1.0
    taken = [
        number * (need.num_smallest_bytes + int(share * each))
        for (number, need), each in zip(needs, more, strict=True)
    ]
    return taken, max(0, smallest - room)


def _wanted_kv(engine_args: dict[str, Any]) -> int | None:
    wanted = engine_args.get("kv_cache_memory_bytes")
    if wanted is not None and (not isinstance(wanted, int) or wanted <= 0):
        raise ConfigError(f"engine.args.kv_cache_memory_bytes: {wanted!r} is not a count of bytes")
    return wanted


def _weights_text(size: ModelSize | None) -> str:
    if size is None or not size.num_weight_bytes:
        return ", and the model's weights, whose size is not known yet"
    if size.is_guess:
        return f", with {gib(size.num_weight_bytes)} of weights, guessed by the model's name"
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
        f"{key}: not enough memory: {replicas} × {gib(base + kv)} "
        f"(KV cache {gib(kv)} of it) and {gib(_CONTROL_BYTES)} for Ray are "
        f"{gib(needed)}, {gib(num_free_bytes)} are free: {advice}, or free memory"
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
                f"{gib(gpu.num_free_bytes)} of {gib(gpu.num_bytes)} free, {share} of it are "
                "asked for: lower it, or end what else runs on that GPU"
            )
    budget = min(gpu.num_bytes for gpu in gpus) * (1 if explicit_kv else share)
    if size is None or not size.num_weight_bytes:
        return [f"vLLM fills {share:.0%} of each GPU; the model's size is not known yet."], []
    weights = size.num_weight_bytes / per_replica
    too_large = (
        f"tensor_parallel_size: the weights are {gib(size.num_weight_bytes)}, "
        f"{gib(weights)} on each of {per_replica} GPU{'s' if per_replica > 1 else ''}, of "
        f"which vLLM may use {gib(budget)}: raise tensor_parallel_size"
    )
    if weights <= _MAX_WEIGHTS_SHARE * budget:
        guess = " (guessed by the model's name)" if size.is_guess else ""
        return [
            f"Weights take {gib(weights)} of each GPU{guess}, and of the {gib(budget)} that "
            "vLLM may use the rest goes to activations and KV cache."
        ], []
    if not size.is_guess:
        raise ConfigError(too_large)
    return [], [f"If the model is as large as its name says: {too_large}."]


def gib(num_bytes: float) -> str:
    if num_bytes < _GIB:
        return f"{num_bytes / _MIB:.0f} MiB"
    return f"{num_bytes / _GIB:.1f} GiB"
