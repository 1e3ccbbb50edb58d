"""Which engines run on which node of a cluster, and where are the gateways?

Every node is planned as a machine of its own, with the engines that it gets; what all engines of a
model have in common follows from the node with least room. Ray places in the end: it goes by GPUs,
by logical CPUs and by the nodes that a model does not fit on, which it is told.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from serving.config import Config, ConfigError
from serving.planning.gateways import (
    CORE_ENGINES_PER_GATEWAY,
    ENGINES_PER_GATEWAY,
    plan_gateways,
)
from serving.planning.machine.nodes import Node, Nodes, head_of, together, working
from serving.planning.model_size import ModelSize
from serving.planning.plan import (
    Plan,
    Share,
    check_keys,
    cores_per_gpu_engine,
    find_device,
    size_of,
)
from serving.planning.service.counts import counted, named
from serving.planning.service.placing import PlacedModel, Placing
from serving.planning.service.service_plan import (
    ONLY,
    Cores,
    ServicePlan,
    check_names,
    deployment_name,
    is_same_engine,
    plan_service,
)

_HEAD = {"node:__internal_head__": 0.001}  # a resource that Ray has on the head node alone
_NODE_ID = "ray.io/node-id"  # a label that Ray gives to every node
_GROWTH = 4  # as in `service_plan`
_GATEWAY_CPUS = 0.1  # logical ones; on the head node none, which may have none


def plan_nodes(
    config: Config,
    nodes: Nodes,
    sizes: Sequence[ModelSize | None] | None = None,
    running: ServicePlan | None = None,
) -> ServicePlan:
    """Return what runs where on these nodes; raise `ConfigError` if it cannot.

    On a single one it is `plan_service`, and so are the other arguments.
    """
    if len(nodes) == 1:
        return plan_service(config, nodes[0].hardware, sizes, running)
    workers = working(nodes)
    if not workers:
        raise ConfigError("there is no node with CPUs or GPUs that Ray may give to engines")
    models = list(_models(config, workers, sizes, running))
    placing = Placing(config, workers, models)
    warnings = _place(models, placing, len(workers))
    cpus = _engine_cpus(config, workers, models, running)
    num_gateways, gateway_options, why = _front(config, nodes, workers, models, running)
    share = Share(num_gateways=num_gateways, engine_cpus=cpus, gateway_cpus=0.0)
    planned: list[tuple[Config, Plan]] = []
    cores = Cores(
        (model.running, max(model.engines.values())) for model in models if not model.on_gpu
    )
    for index, model in enumerate(models):
        refused = {
            node: reason
            for at, node in enumerate(workers)
            if not model.engines[at] and (reason := _misfit(placing, model, index, at))
        }
        with named(model.key):
            plan = _of_model(placing, models, index, workers, share, refused)
        if model.running is not None:
            plan = replace(model.running, num_replicas=plan.num_replicas, why=plan.why)
        else:
            on_cores = config.models and not model.on_gpu
            plan = replace(
                plan,
                gateway_actor_options=gateway_options,
                deployment=deployment_name(plan.served_model_name) if config.models else ONLY,
                first_core=cores.take(max(model.engines.values())) if on_cores else 0,
            )
        selector = _selector(config, workers, model, refused)
        options = {**plan.engine_actor_options, **selector}
        planned.append((model.config, replace(plan, engine_actor_options=options)))
    check_names(planned)
    return ServicePlan(
        tuple(planned),
        tuple(why),
        tuple(warnings),
        on_nodes={
            node.name: {
                plan.served_model_name: model.engines[at]
                for model, (_, plan) in zip(models, planned, strict=True)
                if model.engines[at]
            }
            for at, node in enumerate(workers)
        },
        max_gateways_per_node=(
            _num_set(config)
            if config.gateway.front == "own" and config.gateway.placement == "nodes"
            else 0
        ),
        num_shared_gpus=_num_shared_gpus(workers, models),
    )


def _models(
    config: Config,
    workers: Nodes,
    sizes: Sequence[ModelSize | None] | None,
    running: ServicePlan | None,
) -> Iterable[PlacedModel]:
    hardware = together(workers)
    for index, each in enumerate(config.by_model()):
        key = f"models.{index}." if config.models else ""
        with named(key):
            check_keys(each)
            on_gpu = find_device(each, hardware) == "cuda"
        before = running.models if running is not None else ()
        plan = next((plan for was, plan in before if is_same_engine(was, each)), None)
        size = sizes[index] if sizes else None
        yield PlacedModel(key, each, size or size_of(each), on_gpu, plan)


def _place(models: Sequence[PlacedModel], placing: Placing, num_nodes: int) -> list[str]:
    """Give all models their engines; return warnings. Raise `ConfigError` if they do not fit."""
    warnings = []
    # What needs most of one node first; and what has a number before what takes the rest.
    order = sorted(
        range(len(models)), key=lambda at: (models[at].wanted is None, -models[at].num_gpus)
    )
    for index in order:
        model = models[index]
        for _ in range(model.wanted or 1):
            with named(model.key):
                if why := placing.add(index):
                    raise ConfigError(why)
    growing = [index for index in order if models[index].wanted is None]
    while growing:
        index = min(growing, key=lambda at: models[at].number * max(1, models[at].num_gpus))
        model = models[index]
        # On cores one on each node that holds one, and two in all to show routing.
        num_fit = sum(not placing.why_not(index, at, 1) for at in range(num_nodes))
        is_enough = not model.on_gpu and model.number >= max(2, num_fit)
        if is_enough or placing.add(index, overfills=False):
            growing.remove(index)
    for index, model in enumerate(models):
        if (scaling := model.config.scaling) is None:
            continue
        while model.number < scaling.max:
            if why := placing.add(index):
                warnings.append(
                    f"{model.number} of at most {scaling.max} engines have room; more wait until "
                    f"nodes join ({why})."
                )
                break
    return warnings


def _num_shared_gpus(workers: Nodes, models: Sequence[PlacedModel]) -> int:
    """Return the GPUs that models whose engines come and go leave to each other; 0 for none."""
    fixed = scaled = 0
    for model in models:
        scaling = model.config.scaled_up_to(model.number).scaling
        if scaling is None:
            fixed += model.number * model.num_gpus
        else:
            scaled += scaling.max * model.num_gpus
    left = sum(len(node.hardware.gpus) for node in workers) - fixed
    return left if scaled > left else 0


def _misfit(placing: Placing, model: PlacedModel, index: int, at: int) -> str:
    """Return why a model can have no engine on a node, however empty that is; "" if it can."""
    if model.on_gpu and len(placing.nodes[at].hardware.gpus) < model.num_gpus:
        return f"it has fewer than {counted(model.num_gpus, 'GPU')}"
    return placing.why_not(index, at, 1)


def _of_model(
    placing: Placing,
    models: Sequence[PlacedModel],
    index: int,
    workers: Nodes,
    share: Share,
    refused: dict[Node, str],
) -> Plan:
    """Return the plan of all engines of a model: that of the node with least room for them."""
    model = models[index]
    plans = {
        at: placing.plan(index, at, number, share) for at, number in model.engines.items() if number
    }
    plan = min(plans.values(), key=lambda each: (each.num_kv_bytes or 0, each.device_name))
    names = list(dict.fromkeys(each.device_name for each in plans.values()))
    where = ", ".join(f"{model.engines[at]} on {workers[at].name}" for at in sorted(plans))
    chosen = "auto" if model.config.max_replicas == "auto" else "replicas is set"
    why = [
        f"{counted(model.number, 'engine')} over {counted(len(plans), 'node')}, {where}: {chosen}."
    ]
    why += [f"None on {node.name}: {each}." for node, each in refused.items()]
    # What is said of nodes one by one; of those that are alike once.
    why += dict.fromkeys(sentence for each in plans.values() for sentence in each.why[1:])
    scaling = model.config.scaling
    return replace(
        plan,
        device_name=" or ".join(names),
        num_replicas=model.number if scaling is None else scaling.max,
        why=tuple(why),
        warnings=tuple(dict.fromkeys(said for each in plans.values() for said in each.warnings)),
    )


def _selector(
    config: Config, workers: Nodes, model: PlacedModel, refused: dict[Node, str]
) -> dict[str, Any]:
    """Return Ray's options that keep engines off some nodes, or on those that are filled first."""
    never = [node.node_id for node in refused if node.node_id]
    rule = {_NODE_ID: f"!in({','.join(never)})"} if never else {}
    used = [workers[at].node_id for at, number in sorted(model.engines.items()) if number]
    if config.placement == "pack" and all(used) and len(used) + len(never) < len(workers):
        # If one of them is lost, elsewhere all the same.
        only = {_NODE_ID: f"in({','.join(used)})"}
        return {"label_selector": only, "fallback_strategy": [{"label_selector": rule}]}
    return {"label_selector": rule} if rule else {}


def _engine_cpus(
    config: Config, workers: Nodes, models: Sequence[PlacedModel], running: ServicePlan | None
) -> float:
    """Return the logical CPUs of an engine: so many that every node can hold what it gets."""
    if running is not None:
        num_cpus: float = running.plans[0].engine_actor_options["num_cpus"]
        return num_cpus
    shares = [1.0]
    for at, node in enumerate(workers):
        if number := sum(model.engines[at] for model in models):
            left = node.num_cpus
            if not _are_at_head(config):
                left -= _gateway_cpus(workers) * _num_set(config)
            shares.append(max(0.0, left) / number / (_GROWTH if config.models else 1))
    return int(min(shares) * 1000) / 1000


def _are_at_head(config: Config) -> bool:
    return config.gateway.front == "own" and config.gateway.placement == "head"


def _num_set(config: Config) -> int:
    """Return how many gateways are asked for; one for `auto`, which goes with the head node."""
    return 1 if config.gateway.replicas == "auto" else config.gateway.num_replicas


def _gateway_cpus(workers: Nodes) -> float:
    return min(_GATEWAY_CPUS, min(node.num_cpus for node in workers) / 4)


def _front(
    config: Config,
    nodes: Nodes,
    workers: Nodes,
    models: Sequence[PlacedModel],
    running: ServicePlan | None,
) -> tuple[int, dict[str, Any], list[str]]:
    """Return the number of gateways, Ray's options of each, and why, in sentences.

    Those that are running stay as they are, whatever becomes of the engines.
    """
    if running is not None:
        return running.num_gateways, running.plans[0].gateway_actor_options, []
    if config.gateway.front == "haproxy":
        options: dict[str, Any] = {"num_cpus": _gateway_cpus(workers)}
        said = "HAProxy is on every node, and finds gateways where Ray has them."
        return _num_set(config), options, [said]
    if config.gateway.placement == "nodes":
        each = _num_set(config)
        return (
            each * len(workers),
            {"num_cpus": _gateway_cpus(workers)},
            [
                f"{counted(each, 'gateway')} on each of {counted(len(workers), 'node')}, on port "
                f"{config.gateway.port} of each."
            ],
        )
    head = head_of(nodes)
    at_head = next((at for at, node in enumerate(workers) if node is head), None)
    busy = 0
    for model in models:
        per_engine = cores_per_gpu_engine(model.num_gpus) if model.on_gpu else 1
        busy += per_engine * (model.engines[at_head] if at_head is not None else 0)
    num_engines = sum(model.number for model in models)
    on_cores = all(model.config.engine.is_vllm and not model.on_gpu for model in models)
    number, why = plan_gateways(
        config,
        num_engines,
        len(head.hardware.cores),
        cores_per_engine=busy / num_engines,
        per_gateway=CORE_ENGINES_PER_GATEWAY if on_cores else ENGINES_PER_GATEWAY,
    )
    where = f"Gateways are on the head node, {head.name}: clients connect there."
    return number, {"num_cpus": 0, "resources": dict(_HEAD)}, [*why, where]
