"""How does a plan look to a person?"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from serving.cli.config_file import ConfigFile
from serving.config import Config
from serving.planning.hardware import Gpu, Hardware
from serving.planning.machine.nodes import Nodes
from serving.planning.plan import Plan
from serving.planning.service.service_plan import ServicePlan

_GIB = 1 << 30


def print_plan(console: Console, file: ConfigFile, nodes: Nodes, plan: ServicePlan) -> None:
    """Print what the machines have, what would start on them, and why; models one by one."""
    table = Table.grid(padding=(0, 2))
    for number, node in enumerate(nodes):
        if len(nodes) > 1:
            if number:
                table.add_row()
            table.add_row("node", f"{node.name}{', the head' if node.is_head else ''}")
        _add_hardware(table, node.hardware, is_alone=len(nodes) == 1)
        if (engines := plan.on_nodes.get(node.name)) is not None:
            table.add_row("engines", _listed(engines))
    gateways = "" if plan.num_gateways == 1 else f", {plan.num_gateways} gateways"
    front = ("front", f"{file.config.gateway.front}, {file.url}/v1{gateways}")
    if len(plan.plans) > 1 or len(nodes) > 1:
        table.add_row()
    if len(plan.plans) > 1:
        table.add_row(*front)
    if len(plan.plans) > 1 or len(nodes) > 1:
        _add_sentences(table, plan.why, plan.warnings)
    for config, each in plan.models:
        table.add_row()
        _add_model(table, config, each, None if len(plan.plans) > 1 else front)
        _add_sentences(table, each.why, each.warnings)
    console.print(table)


def _listed(engines: Mapping[str, int]) -> str:
    """Return how many engines of which models a node has."""
    return ", ".join(f"{number} of {name}" for name, number in engines.items()) or "none"


def _add_model(table: Table, config: Config, plan: Plan, front: tuple[str, str] | None) -> None:
    names = ", ".join((plan.served_model_name, *plan.aliases))
    model = plan.model or ("bundled" if plan.uses_bundled_model else "none")
    table.add_row("model", f"{model}, served as {names}")
    table.add_row("engines", f"{plan.num_replicas} × {plan.device_name}")
    if memory := _memory(plan):
        table.add_row("memory", memory)
    if plan.num_kv_bytes:
        table.add_row("KV cache", f"{plan.num_kv_bytes / _GIB:.2f} GiB each")
    table.add_row("Ray asks", f"{plan.engine_actor_options} per engine")
    if front is not None:
        table.add_row(*front)
    for key, value in plan.engine_args.items():
        if key == "max_model_len" and value in (-1, "auto"):
            value = "the longest that the KV cache holds, up to the model's own"
        mine = "  (yours)" if key in config.engine.args else ""
        table.add_row("engine arg", f"{key} = {value}{mine}")
    if front is not None:
        table.add_row()


def _add_sentences(table: Table, why: Iterable[str], warnings: Iterable[str]) -> None:
    for sentence in why:
        table.add_row("why", sentence)
    for sentence in warnings:
        table.add_row("careful", sentence)


def _add_hardware(table: Table, hardware: Hardware, *, is_alone: bool) -> None:
    for name, said in _gpus(hardware.gpus, is_alone=is_alone):
        table.add_row(name, said)
    if hardware.driver:  # of machines that are only listed nothing is known
        table.add_row("driver", f"{hardware.driver}, CUDA {hardware.cuda}")
    table.add_row("CPU", f"{hardware.cpu_name}, {len(hardware.cores)} cores for us")
    table.add_row(
        "RAM",
        f"{hardware.num_free_ram_bytes / _GIB:.1f} of {hardware.num_ram_bytes / _GIB:.1f} GiB free",
    )


def _gpus(gpus: Sequence[Gpu], *, is_alone: bool) -> Iterator[tuple[str, str]]:
    """Yield what to say of GPUs; of several machines' alike ones, which follow each other, once."""
    said = [
        f"{gpu.name}, {gpu.num_free_bytes / _GIB:.1f} of {gpu.num_bytes / _GIB:.1f} GiB free"
        + (f", {gpu.num_nvlinks} NVLinks" if gpu.num_nvlinks > 1 else "")
        + (", MIG" if gpu.mig else "")
        for gpu in gpus
    ]
    if is_alone:
        yield from ((f"GPU {gpu.index}", each) for gpu, each in zip(gpus, said, strict=True))
    else:
        for each, group in itertools.groupby(said):
            number = len(list(group))
            yield f"{number} GPU{'' if number == 1 else 's'}", each


def _memory(plan: Plan) -> str:
    """Return the memory of the engines; what is not known is not counted as nothing."""
    if not plan.num_engine_bytes:
        return ""
    each = plan.num_engine_bytes / _GIB
    if plan.weights_are == "unknown":
        return f"not known: the model's weights, and {each:.1f} GiB each beside them"
    text = f"{each:.1f} GiB each, {plan.num_replicas * each:.1f} GiB in all"
    return f"about {text}, guessed by the model's name" if plan.weights_are == "guessed" else text
