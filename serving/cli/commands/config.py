"""Which configuration keys are there, what are they set to, and what do samples look like?"""

import json
from typing import Annotated, Any

import typer
import yaml
from pydantic import TypeAdapter
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from serving.cli.config_file import IMPORT_PATH
from serving.cli.errors import errors_in_one_line
from serving.cli.options import Model, Set, What, load_file
from serving.cli.samples import FOLDER, sample_names, sample_path, sample_title
from serving.cli.vllm_flags import PassingCommand
from serving.config import Config

config_app = typer.Typer(
    help="Show the keys of the configuration, their values, and samples.", no_args_is_help=True
)


@config_app.command()
def schema(
    args_only: Annotated[
        bool, typer.Option("--args", help="Only of what stands under applications.0.args.")
    ] = False,
) -> None:
    """Print the JSON Schema of a config file: all keys, what they mean and may be.

    Editors complete and check by it: put `# yaml-language-server: $schema=FILE` on top of a file.
    """
    made = TypeAdapter(Config).json_schema()
    if not args_only:
        made = _whole_file(made)
    print(json.dumps(made, indent=2, ensure_ascii=False))


def _whole_file(args: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a Ray Serve config file with one application of these arguments."""
    definitions = args.pop("$defs", {})
    application = {
        "type": "object",
        "required": ["import_path"],
        "properties": {
            "name": {"type": "string"},
            "route_prefix": {"type": "string"},
            "import_path": {"const": IMPORT_PATH},
            "args": args,
            "runtime_env": {"type": "object"},
            "logging_config": {"type": "object"},
        },
        "additionalProperties": False,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Headway's config file, which is Ray Serve's",
        "type": "object",
        "required": ["applications"],
        "properties": {
            "proxy_location": {"enum": ["Disabled", "HeadOnly", "EveryNode"]},
            "http_options": {"type": "object"},
            "logging_config": {"type": "object"},
            "applications": {
                "type": "array",
                "minItems": 1,
                "maxItems": 1,
                "items": application,
            },
        },
        "additionalProperties": False,
        "$defs": definitions,
    }


@config_app.command(cls=PassingCommand)
def show(
    ctx: typer.Context,
    what: What = None,
    model: Model = None,
    set_: Set = None,
    all_: Annotated[bool, typer.Option("--all", help="Also what is left at its default.")] = False,
) -> None:
    """Print the configuration that a config file and options make together. Secrets are masked."""
    with errors_in_one_line():
        file = load_file(ctx)
    args = file.config.model_dump(mode="json", exclude_defaults=not all_)
    _print_yaml(yaml.safe_dump(args, sort_keys=False, allow_unicode=True))


@config_app.command()
def sample(
    name: Annotated[
        str | None,
        typer.Argument(help="Which one.", autocompletion=lambda: sample_names()),
    ] = None,
) -> None:
    """List the sample config files, or print one: `headway config sample cpu > cpu.yaml`."""
    with errors_in_one_line():
        if name is not None:
            print(sample_path(name).read_text(encoding="utf-8"), end="")
            return
    table = Table.grid(padding=(0, 2))
    for each in sample_names():
        table.add_row(each.removesuffix(".yaml"), sample_title(each))
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table, f"\nin {FOLDER}", sep="")


def _print_yaml(text: str) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if console.is_terminal:
        console.print(Syntax(text, "yaml", background_color="default"))
    else:
        print(text, end="")
