"""How do models share one machine, and what is there for one that comes later?

Models with a number of engines get it, or nothing starts: there is one line with the key to change.
Each on `auto` gets one engine, and then they share what is left. Engines that run keep what
they have, whatever else is added, removed or resized.
"""

import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from router.scaling.settings import ScalingSettings
from serving.config import Config, ConfigError
from serving.planning.gateways import (
    CORE_ENGINES_PER_GATEWAY,
    ENGINES_PER_GATEWAY,
    plan_gateways,
)
from serving.planning.hardware import Gpu, Hardware
from serving.planning.model_size import ModelSize
from serving.planning.plan import (
    Plan,
    Share,
    check_keys,
    cores_per_gpu_engine,
    find_device,
    logical_cpus,
    make_plan,
    size_of,
)
from serving.planning.service.counts import (
    Candidate,
    because_of,
    count_on_cores,
    count_on_gpus,
    counted,
    named,
)

ONLY = "Engine"  # the engines of a model that is the only one
# Beside the engines of several models Ray has CPUs left for those that are added or grow later.
_GROWTH = 4


@dataclass(frozen=True, slots=True)
class ServicePlan:
    """What starts where: the engines of all models, and the gateways in front of them."""

    models: tuple[tuple[Config, Plan], ...]  # each with its keys as if it were the only one
    why: tuple[str, ...] = ()  # sentences about all of them
    warnings: tuple[str, ...] = ()  # likewise
    # Over several nodes: engines by the name of their model, by node, if Ray follows the plan.
    on_nodes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    max_gateways_per_node: int = 0  # 0: no bound of ours
    # GPUs that models whose engines come and go leave to each other; 0: each has all it may have.
    num_shared_gpus: int = 0

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plan of each model."""
        return tuple(plan for _, plan in self.models)

    @property
    def num_gateways(self) -> int:
        return self.plans[0].num_gateways

    @property
    def drain_timeout_s(self) -> float:
        """How long engines may drain: as long as the slowest model's."""
        return max(config.engine.drain_timeout_s for config, _ in self.models)


def plan_service(
    config: Config,
    hardware: Hardware,
    sizes: Sequence[ModelSize | None] | None = None,
    running: ServicePlan | None = None,
) -> ServicePlan:
    """Return where the engines of all models run; raise `ConfigError` if they cannot.

    `sizes`: of each model, where they are known better than by local files and names. With the
    plan of what is `running`, `hardware` is as it was before that was started.
    """
    if not config.models:
        size = sizes[0] if sizes else None
        return ServicePlan(((config, _with_range(config, make_plan(config, hardware, size))),))
    models = [
        _model(index, each, hardware, sizes, running)
        for index, each in enumerate(config.by_model())
    ]
    on_gpu = [each for each in models if each.on_gpu]
    num_shared_gpus, why = count_on_gpus(on_gpu, len(hardware.gpus))
    taken, more = count_on_cores([each for each in models if not each.on_gpu], hardware)
    why += more
    num_gateways, engine_cpus, gateway_cpus, more = _front(config, models, hardware, running)
    why += more
    planned: list[tuple[Config, Plan]] = []
    warnings: list[str] = []
    gpus = _Gpus(hardware.gpus, shared=num_shared_gpus > 0)
    cores = Cores((each.running, each.number) for each in models)
    for each in models:
        if each.running is not None:
            gpus.take(each.number * each.num_gpus)
            planned.append((each.config, _resized(each.running, each.number)))
            continue
        share = Share(
            because=because_of(each, len(models)),
            num_other_bytes=sum(taken.values()) - taken.get(id(each), 0),
            num_gateways=num_gateways,
            engine_cpus=engine_cpus,
            gateway_cpus=gateway_cpus,
        )
        machine = replace(hardware, gpus=gpus.take(each.number * each.num_gpus))
        fixed = each.config.model_copy(update={"replicas": each.number})
        with named(each.key):
            plan = make_plan(fixed, machine, each.size, share)
        plan = replace(
            plan,
            deployment=deployment_name(plan.served_model_name),
            first_core=cores.take(each.number) if plan.device == "cpu" else 0,
        )
        planned.append((each.config, _with_range(each.config, plan)))
    if len({gpu.name for gpu in hardware.gpus}) > 1 and len(models) > 1:
        warnings.append("The GPUs differ, and Ray chooses which of them an engine gets.")
    num_core_engines = sum(
        plan.num_replicas for each, plan in planned if plan.device == "cpu" and each.engine.is_vllm
    )
    if num_core_engines > len(hardware.cores):
        warnings.append(
            f"{num_core_engines} engines share {len(hardware.cores)} cores: steps will stretch "
            "many times over; lower replicas, or serve fewer models."
        )
    check_names(planned)
    return ServicePlan(tuple(planned), tuple(why), tuple(warnings), num_shared_gpus=num_shared_gpus)


def deployment_name(served_name: str) -> str:
    """Return what Ray Serve calls the engines of a model, another one for each served name."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", served_name)[:40]
    if plain == served_name:
        return f"{ONLY}-{plain}"
    return f"{ONLY}-{plain}-{zlib.crc32(served_name.encode()):08x}"


def served_names(config: Config, plan: Plan) -> tuple[str, ...]:
    """Return the names that a model's engines will serve, adapters' included.

    Engines that are somebody else's may have others. Empty if only they know: where there are no
    other models, from which theirs has to be told.
    """
    if not config.engine.is_ours:
        return (plan.served_model_name,) if plan.deployment != ONLY else ()
    adapters = [_adapter_name(each) for each in plan.engine_args.get("lora_modules") or ()]
    return (plan.served_model_name, *plan.aliases, *adapters)


def scaling_of(config: Config, plan: Plan) -> ScalingSettings | None:
    """Return by what a model's engines come and go; None if their number is fixed."""
    return config.scaled_up_to(plan.num_replicas).scaling


def num_first(config: Config, plan: Plan) -> int:
    """Return how many engines a model has at the start."""
    scaling = scaling_of(config, plan)
    return plan.num_replicas if scaling is None else scaling.num_initial


def changes(before: ServicePlan, after: ServicePlan) -> list[str]:
    """Return what an edit of the configuration changes, in sentences; nothing for nothing."""
    old = {plan.deployment: (config, plan) for config, plan in before.models}
    new = {plan.deployment: (config, plan) for config, plan in after.models}
    said = []
    for deployment, (config, plan) in new.items():
        name = f"model {plan.served_model_name}"
        if deployment not in old:
            said.append(f"{name} is added: {_engines(num_first(config, plan))} start.")
            continue
        was_config, was = old[deployment]
        if not is_same_engine(was_config, config):
            said.append(f"{name} has changed: its engines are replaced, one after the other.")
        elif (now := range_of(config, plan)) != (earlier := range_of(was_config, was)):
            said.append(f"{name} is resized: from {earlier} to {now}.")
        elif scaling_of(config, plan) != scaling_of(was_config, was):
            said.append(f"{name} comes and goes by other settings.")
        elif was_config.router != config.router:
            said.append(f"{name} has other targets.")
    said += [
        f"model {was.served_model_name} is removed: what it has begun may finish."
        for deployment, (_, was) in old.items()
        if deployment not in new
    ]
    return said


def _model(
    index: int,
    config: Config,
    hardware: Hardware,
    sizes: Sequence[ModelSize | None] | None,
    running: ServicePlan | None,
) -> Candidate:
    key = f"models.{index}."
    with named(key):
        check_keys(config)
        on_gpu = find_device(config, hardware) == "cuda"
        if on_gpu and config.model is None:
            raise ConfigError("model: name the model to serve, as there are GPUs here")
        if not on_gpu and config.tensor_parallel_size > 1:
            raise ConfigError(
                f"tensor_parallel_size: {config.tensor_parallel_size} needs GPUs; leave it at 1"
            )
        size = sizes[index] if sizes else None
        plan = next(
            (
                plan
                for was, plan in (running.models if running is not None else ())
                if is_same_engine(was, config)
            ),
            None,
        )
        model = Candidate(key, config, size or size_of(config), on_gpu, plan)
        if config.max_replicas != "auto":
            model.number = config.max_replicas
        elif plan is not None:
            model.number = plan.num_replicas
        else:
            model.grows = True
        return model


def is_same_engine(was: Config, now: Config) -> bool:
    """Whether a model's engines need not be started anew."""
    keys = ("model", "served_model_name", "tensor_parallel_size", "device", "engine")
    return all(getattr(was, key) == getattr(now, key) for key in keys)


# --- what is beside them -----------------------------------------------------


def _front(
    config: Config, models: Sequence[Candidate], hardware: Hardware, running: ServicePlan | None
) -> tuple[int, float, float, list[str]]:
    """Return the number of gateways, logical CPUs of an engine and of a gateway, and why."""
    if running is not None:
        first = running.plans[0]
        options = first.engine_actor_options, first.gateway_actor_options
        return running.num_gateways, options[0]["num_cpus"], options[1]["num_cpus"], []
    num_engines = sum(each.number for each in models)
    num_busy, num_gateways = 0, 0.0
    for each in models:
        is_core = each.config.engine.is_vllm and not each.on_gpu
        num_busy += each.number * (cores_per_gpu_engine(each.num_gpus) if each.on_gpu else 1)
        num_gateways += each.number / (CORE_ENGINES_PER_GATEWAY if is_core else ENGINES_PER_GATEWAY)
    number, why = plan_gateways(
        config,
        num_engines,
        len(hardware.cores),
        cores_per_engine=num_busy / num_engines,
        per_gateway=num_engines / num_gateways,
    )
    engine_cpus, gateway_cpus = logical_cpus(len(hardware.cores), num_engines, number)
    return number, int(engine_cpus / _GROWTH * 1000) / 1000, gateway_cpus, why


class _Gpus:
    """Hands out GPUs. Ray chooses which ones an engine gets: where they differ, the smallest."""

    def __init__(self, gpus: Sequence[Gpu], *, shared: bool) -> None:
        """`shared`: models may have the same ones, at other times."""
        differ = len({gpu.num_bytes for gpu in gpus}) > 1
        self._any = differ or shared
        self._gpus = sorted(gpus, key=lambda gpu: gpu.num_bytes) if differ else list(gpus)

    def take(self, number: int) -> tuple[Gpu, ...]:
        """Return so many GPUs to plan with."""
        taken = tuple(self._gpus[:number])
        if not self._any:
            self._gpus = self._gpus[number:]
        return taken


class Cores:
    """Hands out cores in rows, which engines count off; those of running engines stay theirs."""

    def __init__(self, running: Iterable[tuple[Plan | None, int]]) -> None:
        """`running`: the plan of each model that is, if it is, and how many engines it has now."""
        self._taken: set[int] = set()
        for plan, number in running:
            if plan is not None and plan.device == "cpu":
                self._taken.update(range(plan.first_core, plan.first_core + number))

    def take(self, number: int) -> int:
        """Return the first core of a row of so many."""
        first = 0
        while any(first + each in self._taken for each in range(number)):
            first += 1
        self._taken.update(range(first, first + number))
        return first


def _resized(plan: Plan, number: int) -> Plan:
    if number == plan.num_replicas:
        return plan
    why = f"{_engines(number)}: resized from {plan.num_replicas}."
    return replace(plan, num_replicas=number, why=(why, *plan.why[1:]))


def check_names(planned: Sequence[tuple[Config, Plan]]) -> None:
    """Raise `ConfigError` if two models would answer to one name, by default or by an adapter."""
    seen: dict[str, int] = {}
    for index, (config, plan) in enumerate(planned):
        for name in served_names(config, plan):
            if seen.setdefault(name, index) != index:
                raise ConfigError(
                    f"models.{index}: the name {name!r} is that of models.{seen[name]} already: "
                    "set another served_model_name, alias or adapter"
                )


def _adapter_name(module: Any) -> str:
    """Return the name of a LoRA adapter in any of the forms that vLLM takes it in."""
    if isinstance(module, str):  # NAME=PATH, or JSON
        return module.partition("=")[0] if module[:1] != "{" else json.loads(module)["name"]
    return module["name"] if isinstance(module, dict) else module.name


def _with_range(config: Config, plan: Plan) -> Plan:
    """Return the plan with a sentence about how many of the engines run, if they come and go."""
    if scaling_of(config, plan) is None:
        return plan
    return replace(
        plan, why=(*plan.why, f"{range_of(config, plan)} of them, as many as are needed.")
    )


def range_of(config: Config, plan: Plan) -> str:
    """Return how many engines a model has, in words: 2, or 0 to 2."""
    scaling = scaling_of(config, plan)
    return str(plan.num_replicas) if scaling is None else f"{scaling.min} to {scaling.max}"


def _engines(number: int) -> str:
    return counted(number, "engine")
