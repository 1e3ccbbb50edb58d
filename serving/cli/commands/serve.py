"""How do `headway serve`, `plan` and `profile` begin? With one configuration and one plan."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from serving.cli.commands import weights
from serving.cli.commands.plan_table import print_plan
from serving.cli.config_file import check_with_ray
from serving.cli.errors import errors_in_one_line
from serving.cli.interrupts import run_until_stopped
from serving.cli.launch import launch
from serving.cli.launching.joining import join
from serving.cli.options import (
    Device,
    Front,
    Host,
    Insecure,
    LogDir,
    LogFormat,
    LogLevel,
    Model,
    Policy,
    Port,
    Replicas,
    ServedModelName,
    Set,
    Start,
    TensorParallelSize,
    What,
    check_guarded,
    load_and_plan,
    load_file,
    plan_start,
)
from serving.config import ConfigError
from serving.core_form import form
from serving.planning.machine.listed import listed_nodes
from serving.planning.plan import Plan


def serve(
    ctx: typer.Context,
    what: What = None,
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
    insecure: Insecure = False,
    log_dir: LogDir = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
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
    with errors_in_one_line(verbose=verbose), contextlib.ExitStack() as stack:
        joined = None
        if address is None:
            start = load_and_plan(ctx, must_start=True)
        else:
            file = load_file(ctx)
            check_guarded(file)
            joined = stack.enter_context(join(file, address, verbose=verbose))
            start = plan_start(file, joined.nodes, must_start=True)
        plans = start.plan.plans
        for sentence in (
            *start.plan.why[: None if len(start.nodes) > 1 else 1],
            *(_of_model(each, plans, each.why[0]) for each in plans if each.why),
            *start.notes,
            *start.plan.warnings,
            *(_of_model(each, plans, sentence) for each in plans for sentence in each.warnings),
        ):
            console.print(sentence)
        if form() == "plain":
            console.print("the router runs as plain Python, not compiled (docs/compiled.md)")
        code = launch(
            start.file,
            start.plan,
            start.nodes[0].hardware,
            console,
            joined=joined,
            verbose=verbose,
            fetch=lambda: _fetch(start, console),
            reload=lambda: load_file(ctx),
        )
        raise typer.Exit(code)


def plan(
    ctx: typer.Context,
    what: What = None,
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
    insecure: Insecure = False,
    hardware: Annotated[
        str | None,
        typer.Option(
            metavar="8xH100-80GB,4xA100-40GB",
            help="Plan for these machines and not for this one: GPUs of each by number, name and "
            "size, or 16xCPU-64GB. Cores and RAM beside GPUs are assumed.",
        ),
    ] = None,
) -> None:
    """Show which engines `headway serve` would start where, and why. Starts nothing."""
    with errors_in_one_line():
        if hardware is None:
            start = load_and_plan(ctx)
        else:
            start = plan_start(load_file(ctx), listed_nodes(hardware))
        check_with_ray(start.file)
        console = Console(highlight=False, markup=False)
        print_plan(console, start.file, start.nodes, start.plan)
        for sentence in start.notes:
            console.print(sentence)


def profile(
    ctx: typer.Context,
    what: What = None,
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
        start = load_and_plan(ctx, must_start=True)
        console = Console(highlight=False, markup=False, soft_wrap=True)
        with _missing_package_named():
            from serving.capacity import profile
        if len(start.plan.plans) > 1:
            raise ConfigError("models: a profile is of one model; name it as MODEL")
        _fetch(start, console)
        args = start.file.application["args"]
        run_until_stopped(lambda: profile.run(args, start.plan.plans[0], output, console))


def _fetch(start: Start, console: Console) -> None:
    """Download what is missing of any model."""
    for each, config in zip(start.weights, start.file.config.by_model(), strict=True):
        weights.fetch(each, config, console)


def _of_model(plan: Plan, plans: Sequence[Plan], sentence: str) -> str:
    """Return a sentence about a model, with its name if there are others."""
    return sentence if len(plans) == 1 else f"{plan.served_model_name}: {sentence}"


@contextlib.contextmanager
def _missing_package_named() -> Iterator[None]:
    """Raise `ConfigError` if the block imports a package that only developers have."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).partition(".")[0]
        raise ConfigError(
            f"this command needs the module {package}: pip install {package}"
        ) from None
