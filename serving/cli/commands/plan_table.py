"""How does a plan look to a person?"""

from rich.console import Console
from rich.table import Table

from serving.cli.config_file import ConfigFile
from serving.planning.hardware import Hardware
from serving.planning.plan import Plan

_GIB = 1 << 30


def print_plan(console: Console, file: ConfigFile, hardware: Hardware, plan: Plan) -> None:
    """Print what the machine has, what would start on it, and why."""
    table = Table.grid(padding=(0, 2))
    _add_hardware(table, hardware)
    table.add_row()
    names = ", ".join((plan.served_model_name, *plan.aliases))
    model = plan.model or ("bundled" if plan.uses_bundled_model else "none")
    table.add_row("model", f"{model}, served as {names}")
    table.add_row("engines", f"{plan.num_replicas} × {plan.device_name}")
    if memory := _memory(plan):
        table.add_row("memory", memory)
    if plan.num_kv_bytes:
        table.add_row("KV cache", f"{plan.num_kv_bytes / _GIB:.2f} GiB each")
    table.add_row("Ray asks", f"{plan.engine_actor_options} per engine")
    gateways = "" if plan.num_gateways == 1 else f", {plan.num_gateways} gateways"
    table.add_row("front", f"{file.config.gateway.front}, {file.url}/v1{gateways}")
    for key, value in plan.engine_args.items():
        if key == "max_model_len" and value in (-1, "auto"):
            value = "the longest that the KV cache holds, up to the model's own"
        mine = "  (yours)" if key in file.config.engine.args else ""
        table.add_row("engine arg", f"{key} = {value}{mine}")
    table.add_row()
    for sentence in plan.why:
        table.add_row("why", sentence)
    for sentence in plan.warnings:
        table.add_row("careful", sentence)
    console.print(table)


def _add_hardware(table: Table, hardware: Hardware) -> None:
    for gpu in hardware.gpus:
        table.add_row(
            f"GPU {gpu.index}",
            f"{gpu.name}, {gpu.num_free_bytes / _GIB:.1f} of {gpu.num_bytes / _GIB:.1f} GiB free"
            + (f", {gpu.num_nvlinks} NVLinks" if gpu.num_nvlinks else "")
            + (", MIG" if gpu.mig else ""),
        )
    if hardware.gpus:
        table.add_row("driver", f"{hardware.driver}, CUDA {hardware.cuda}")
    table.add_row("CPU", f"{hardware.cpu_name}, {len(hardware.cores)} cores for us")
    table.add_row(
        "RAM",
        f"{hardware.num_free_ram_bytes / _GIB:.1f} of {hardware.num_ram_bytes / _GIB:.1f} GiB free",
    )


def _memory(plan: Plan) -> str:
    """Return the memory of the engines; what is not known is not counted as nothing."""
    if not plan.num_engine_bytes:
        return ""
    each = plan.num_engine_bytes / _GIB
    if plan.weights_are == "unknown":
        return f"not known: the model's weights, and {each:.1f} GiB each beside them"
    text = f"{each:.1f} GiB each, {plan.num_replicas * each:.1f} GiB in all"
    return f"about {text}, guessed by the model's name" if plan.weights_are == "guessed" else text
