"""Which options do the commands share, and what do they set?"""

import importlib.util
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from router.scheduling.policies import POLICIES
from serving.cli.commands.weights import Weights, look_up
from serving.cli.config_file import ConfigFile, load_config_file
from serving.cli.samples import sample_names, sample_path
from serving.cli.vllm_flags import FLAGS, read_flags
from serving.config import ConfigError
from serving.gateway.http.endpoint import check_is_guarded
from serving.planning.hardware import Hardware, detect_hardware
from serving.planning.hub import cached_models
from serving.planning.machine.nodes import Nodes, this_machine
from serving.planning.service.over_nodes import plan_nodes
from serving.planning.service.service_plan import ServicePlan

_SUFFIXES = (".yaml", ".yml")


def _complete_what(incomplete: str) -> list[str]:
    """Return config files and folders that begin so, and models that are in the cache."""
    paths = [path for path in Path().glob(f"{incomplete}*") if not path.name.startswith(".")]
    names = [f"{path}/" for path in paths if path.is_dir()]
    names += [str(path) for path in paths if path.suffix in _SUFFIXES]
    return names + [name for name in cached_models() if name.startswith(incomplete)]


def complete_from(*values: str) -> Any:
    """Return what completes an option that takes one of these values."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


What = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL|CONFIG.yaml",
        help="A model (Hugging Face id or folder), or a Ray Serve config file such as those that "
        "`headway config sample` lists. Without one: the bundled model on CPU.",
        autocompletion=_complete_what,
    ),
]
Model = Annotated[str | None, typer.Option(help="As MODEL, beside a config file.")]
ServedModelName = Annotated[
    list[str] | None,
    typer.Option(help="The name that clients ask for. Repeatable: they mean the same model."),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="auto|cuda|cpu",
        help="Where engines run.",
        autocompletion=complete_from("auto", "cuda", "cpu"),
    ),
]
Replicas = Annotated[
    str | None,
    typer.Option(
        "--replicas", "--data-parallel-size", "-dp", metavar="N|auto", help="Number of engines."
    ),
]
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
        autocompletion=complete_from("own", "haproxy"),
    ),
]
Policy = Annotated[
    str | None,
    typer.Option(
        help=f"How an engine is chosen (router.policy): {', '.join(POLICIES)}.",
        autocompletion=complete_from(*POLICIES),
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any key of the configuration by its dotted path, with its value in YAML, "
        "e.g. --set router.max_hold_s=60. Repeatable; `headway config schema` has them all.",
    ),
]
Insecure = Annotated[
    bool,
    typer.Option(
        "--insecure", help="Let a host that the network reaches be open to whoever reaches it."
    ),
]
LogDir = Annotated[
    Path | None,
    typer.Option(
        "--log-dir",
        help="Folder (log.dir) for a line per request, and for the logs of Ray and of the engines "
        "at the end.",
        file_okay=False,
    ),
]
LogFormat = Annotated[
    str | None,
    typer.Option(
        "--log-format",
        metavar="json|text",
        help="Of a request's line (log.format).",
        autocompletion=complete_from("json", "text"),
    ),
]
LogLevel = Annotated[
    str | None,
    typer.Option(
        "--log-level",
        metavar="debug|info|warning|error",
        help="Of gateways and engines (log.level).",
        autocompletion=complete_from("debug", "info", "warning", "error"),
    ),
]

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
    "insecure": "gateway.insecure",
    "log_dir": "log.dir",
    "log_format": "log.format",
    "log_level": "log.level",
}


def load_file(ctx: typer.Context) -> ConfigFile:
    """Return the configuration for the command's parameters, and for vLLM's among them."""
    params = dict(ctx.params)
    path = None
    if (what := params.get("what")) is not None:
        if what.endswith(_SUFFIXES):
            path = _config_path(what)
        elif params.get("model"):
            raise ConfigError(f"--model {params['model']}: {what} is the model already")
        else:
            params["model"] = what
    if not params.get("insecure"):
        params["insecure"] = None  # the file's own says it
    given = {name: params[name] for name in _KEYS if params.get(name) not in (None, ())}
    if "served_model_name" in given:  # repeatable
        given["served_model_name"] = list(given["served_model_name"])
    if "log_dir" in given:  # of the command line: not beside the config file
        given["log_dir"] = str(given["log_dir"].absolute())
    options = {_KEYS[name]: value for name, value in given.items()}
    if options.get("replicas", "auto") != "auto":
        options["replicas"] = _parse_yaml("replicas", options["replicas"])
    for assignment in params.get("set_") or ():
        key, equals, value = assignment.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"--set {assignment}: is not of the form KEY=VALUE")
        options[key] = _parse_yaml(key, value)
    file = load_config_file(path, options)
    if flags := ctx.meta.get(FLAGS):
        if not file.config.engine.is_vllm:
            raise ConfigError(f"{flags[0]}: no such option, and this engine is not vLLM")
        values = {f"engine.args.{name}": value for name, value in read_flags(flags).items()}
        file = load_config_file(path, options | values)
    return file


@dataclass(frozen=True, slots=True)
class Start:
    """What a launch begins with."""

    file: ConfigFile
    nodes: Nodes  # one: this machine, or one of which there is only a description
    plan: ServicePlan
    weights: tuple[Weights, ...]  # of each model
    notes: tuple[str, ...]  # sentences


def load_and_plan(ctx: typer.Context, *, must_start: bool = False) -> Start:
    """Return configuration, hardware and plan for the command's parameters, on this machine.

    Raise `ConfigError` if they cannot be, or, if it `must_start`, could not start.
    """
    file = load_file(ctx)
    hardware = detect_hardware()
    if must_start:
        check_guarded(file)
        check_vllm_is_installed(file, hardware)
    return plan_start(file, this_machine(hardware), must_start=must_start)


def plan_start(file: ConfigFile, nodes: Nodes, *, must_start: bool = False) -> Start:
    """Return what a launch on these nodes begins with. Raise `ConfigError` as `load_and_plan`."""
    config = file.config
    weights = tuple(look_up(each, must_be_there=must_start) for each in config.by_model())
    plan = plan_nodes(config, nodes, [each.size for each in weights])
    notes = tuple(each.note for each in weights if each.note)
    return Start(file, nodes, plan, weights, notes)


def check_guarded(file: ConfigFile) -> None:
    """Raise `ConfigError` if the service would be open to a network without keys."""
    check_is_guarded(
        file.host,
        has_keys=file.config.auth.keys_file is not None,
        insecure=file.config.gateway.insecure,
    )


def check_vllm_is_installed(file: ConfigFile, hardware: Hardware) -> None:
    """Raise `ConfigError` where engines would look for vLLM and not find it, or not whole."""
    if not any(each.engine.is_vllm for each in file.config.by_model()):
        return
    if hardware.vllm_build:
        _check_torchvision_fits()
        return
    if importlib.util.find_spec("vllm") is not None:  # built here, under a name of its own
        return
    extra = "gpu" if hardware.gpus else "cpu"
    raise ConfigError(
        f"vLLM is not installed: pip install 'headway[{extra}]', or try emulated engines: "
        "--set engine=emulated"
    )


def _check_torchvision_fits() -> None:
    """Raise `ConfigError` for PyPI's torchvision beside a CPU build of torch, its index's not.

    It cannot be imported there (`operator torchvision::nms does not exist`), and then neither can
    transformers, nor vLLM. `pip install headway[cpu]` from PyPI and a wheel of torch ends so.
    """
    try:
        torch, vision = version("torch"), version("torchvision")
    except PackageNotFoundError:
        return
    if torch.endswith("+cpu") and "+" not in vision:
        raise ConfigError(
            f"torchvision {vision} is not built for torch {torch}, and vLLM cannot be imported "
            "beside it: pip uninstall torchvision torchaudio torchcodec (text needs none of them)"
        )


def _config_path(name: str) -> Path:
    """Return the path of a config file. Raise `ConfigError` if it is only the name of a sample."""
    path = Path(name)
    if not path.exists() and path.name in sample_names():
        raise ConfigError(f"{path}: no such file; the sample is {sample_path(path.name)}")
    return path


def _parse_yaml(key: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: {value!r} is not YAML: {' '.join(str(error).split())}") from None
