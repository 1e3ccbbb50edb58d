"""How many engines does each of several models get?"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from router.scaling.settings import ScalingSettings
from serving.config import Config, ConfigError
from serving.planning.hardware import Hardware
from serving.planning.memory import EngineNeed, engine_need, gib, share_memory
from serving.planning.model_size import ModelSize
from serving.planning.plan import Plan, core_engine_arguments, gpus_per_engine


@dataclass(slots=True)
class Candidate:
    """One model while it is decided how many engines it gets."""

    key: str  # in front of the names of its keys
    config: Config
    size: ModelSize | None
    on_gpu: bool
    running: Plan | None  # of the engines that it has already
    number: int = 1  # of engines, at most
    grows: bool = False  # auto: it takes more if there is room

    @property
    def name(self) -> str:
        if self.running is not None:
            return self.running.served_model_name
        return next(iter(self.config.served_names), self.config.model or "the bundled model")

    @property
    def num_gpus(self) -> int:
        """GPUs of one engine."""
        return gpus_per_engine(self.config) if self.on_gpu else 0

    @property
    def scaling(self) -> ScalingSettings | None:
        """By what engines come and go; None if all that there may be always run."""
        return self.config.scaled_up_to(self.number).scaling

    @property
    def least(self) -> int:
        """Engines that it has in any case."""
        return self.number if self.scaling is None else self.scaling.min

    @property
    def number_key(self) -> str:
        """The key by which its number of engines is bounded."""
        return f"{self.key}replicas" + (".max" if self.config.scaling is not None else "")

    def need(self, hardware: Hardware) -> EngineNeed:
        """Return what an engine takes of RAM; only vLLM on a CPU is asked."""
        if self.running is not None:
            assert self.running.num_engine_bytes is not None
            return EngineNeed(self.running.num_engine_bytes, 0, 0)
        with named(self.key):
            return engine_need(*core_engine_arguments(self.config, hardware, self.size))


def count_on_gpus(models: Sequence[Candidate], num_gpus: int) -> tuple[int, list[str]]:
    """Decide the numbers of engines on GPUs. Return how many GPUs models share, and why.

    The least first: of those that grow, each time the one with the fewest GPUs. Models whose
    engines come and go may have more in all than there are GPUs, if what each always has fits, and
    beside that the most of any; else they share none, 0. Raise `ConfigError` if there are too few.
    """
    if not models:
        return 0, []
    left = num_gpus - sum(each.number * each.num_gpus for each in models)
    while growing := [each for each in models if each.grows and each.num_gpus <= left]:
        poorest = min(growing, key=lambda each: each.number * each.num_gpus)
        poorest.number += 1
        left -= poorest.num_gpus
    if left >= 0:
        idle = f"; {counted(left, 'GPU')} stay{'s' if left == 1 else ''} idle" if left else ""
        return 0, [f"{counted(num_gpus, 'GPU')} here: {_listed(models)}{idle}."]
    scaled = [each for each in models if each.scaling is not None]
    if not scaled:
        raise ConfigError(
            f"models: {_listed(models)} need {counted(num_gpus - left, 'GPU')}, this node has "
            f"{num_gpus}: {_advice(models)}"
        )
    listed = _listed(models, least=True)
    free = num_gpus - sum(each.least * each.num_gpus for each in models)
    if free < 0:
        most = max(models, key=lambda each: (each.least > 1, each.least * each.num_gpus))
        key = f"{most.key}replicas" + ("" if most.scaling is None else ".min")
        raise ConfigError(
            f"models: {listed}: what always runs needs {counted(num_gpus - free, 'GPU')}, this "
            f"node has {num_gpus}: lower {key}"
        )
    for each in scaled:
        if (room := each.least + free // each.num_gpus) < each.number:
            raise ConfigError(
                f"models: {listed}: beside what always runs this node with "
                f"{counted(num_gpus, 'GPU')} has room for {counted(room, 'engine')} of "
                f"{each.name}: lower {each.number_key}"
            )
    shared = num_gpus - sum(each.number * each.num_gpus for each in models if each.scaling is None)
    return shared, [
        f"{counted(num_gpus, 'GPU')} here, for {num_gpus - left} at most: "
        f"{listed}. What one model gives up another may take."
    ]


def count_on_cores(
    models: Sequence[Candidate], hardware: Hardware
) -> tuple[dict[int, int], list[str]]:
    """Decide the numbers of engines on cores. Return the RAM of each model's, by `id`, and why.

    Raise `ConfigError` if memory does not hold them.
    """
    if not models:
        return {}, []
    num_cores = len(hardware.cores)
    growing = [each for each in models if each.grows]
    if growing:
        left = num_cores - sum(each.number for each in models if not each.grows)
        for each in growing:
            each.number = max(1, min(2, left // len(growing)))
    with_need = [each for each in models if each.config.engine.is_vllm]
    needs = [each.need(hardware) for each in with_need]
    free_bytes = hardware.num_free_ram_bytes
    numbers = [each.number for each in with_need]
    taken, lacking = share_memory(list(zip(numbers, needs, strict=True)), free_bytes)
    if lacking and growing:
        for each in growing:
            each.number = 1
        numbers = [each.number for each in with_need]
        taken, lacking = share_memory(list(zip(numbers, needs, strict=True)), free_bytes)
    if lacking:
        engines = ", ".join(
            f"{each.name} {each.number} × {gib(need.num_smallest_bytes)}"
            for each, need in zip(with_need, needs, strict=True)
        )
        raise ConfigError(
            f"models: {engines} and what Ray takes are {gib(lacking)} more than the "
            f"{gib(free_bytes)} of RAM that are free: {_advice(with_need)}"
        )
    why = [f"{counted(num_cores, 'core')} here: {_listed(models)}."]
    return dict(zip(map(id, with_need), taken, strict=True)), why


def because_of(model: Candidate, num_models: int) -> str:
    if not model.grows:
        return f"{model.number_key} is set" if model.config.replicas != "auto" else "as before"
    what = "GPUs" if model.on_gpu else "cores"
    return f"auto, its share of the {what} beside {counted(num_models - 1, 'other model')}"


def _advice(models: Sequence[Candidate]) -> str:
    """Return the key to change, which is that of the model with most to give."""
    most = max(models, key=lambda each: (each.number > 1, each.number * each.num_gpus))
    if most.number > 1:
        return f"lower {most.number_key}"
    if most.num_gpus > 1:
        return f"lower {most.key}tensor_parallel_size, or remove a model"
    return "remove a model, or choose smaller ones"


@contextlib.contextmanager
def named(key: str) -> Iterator[None]:
    """Have errors of the block name the keys of the model that they are about."""
    try:
        yield
    except ConfigError as error:
        if not key or str(error).startswith("device:"):  # which is the same for all models
            raise
        raise ConfigError(f"{key}{error}") from None


def _listed(models: Sequence[Candidate], *, least: bool = False) -> str:
    """Return the models' engines in words, with `least` as a range where they come and go."""
    listed = []
    for each in models:
        number = str(each.number)
        if least and each.least < each.number:
            number = f"{each.least} to {number}"
        if each.num_gpus:
            listed.append(f"{each.name} {number} × {counted(each.num_gpus, 'GPU')}")
        else:
            listed.append(f"{each.name} {number} engine" + ("" if number == "1" else "s"))
    return ", ".join(listed)


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
