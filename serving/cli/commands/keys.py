"""How does a person make, list and revoke API keys? `headway key`."""

import datetime
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from serving.cli.errors import errors_in_one_line
from serving.config import ConfigError
from serving.gateway.tenants.keys import KeysFile, make_key, read_keys

key_app = typer.Typer(
    help="Make, list and revoke API keys. A running gateway applies changes within seconds.",
    no_args_is_help=True,
)

_File = Annotated[
    Path,
    typer.Option(
        envvar="HEADWAY_KEYS_FILE", help="The keys file, as in auth.keys_file.", show_default=True
    ),
]
_DEFAULT = Path("headway-keys.json")


@key_app.command()
def create(
    tenant: Annotated[str, typer.Argument(help="Whose key it is.")],
    file: _File = _DEFAULT,
    admin: Annotated[
        bool, typer.Option("--admin", help="May also use /headway/* and /metrics.")
    ] = False,
    expires_days: Annotated[
        float | None, typer.Option(min=0, help="Days until it is refused; never by default.")
    ] = None,
) -> None:
    """Make a key and print it, once: only its hash is stored.

    A tenant may have several keys: to rotate, make the new one, move to it,
    then revoke the old one.
    """
    expires = None
    if expires_days is not None:
        now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
        expires = now + datetime.timedelta(days=expires_days)
    with errors_in_one_line(OSError), KeysFile(file) as keys_file:
        text, key = make_key(tenant, admin=admin, expires=expires)
        keys_file.keys.append(key)
        keys_file.save()
    print(f"key {key.id} of {tenant}, kept as a hash in {file}:", file=sys.stderr)
    print(text)


@key_app.command("list")
def list_command(file: _File = _DEFAULT) -> None:
    """List the keys by id and tenant; only their hashes are stored."""
    with errors_in_one_line(OSError):
        keys = read_keys(file)
    table = Table("id", "tenant", "created", "expires", "admin")
    for key in keys:
        table.add_row(
            key.id,
            key.tenant,
            key.created.isoformat(),
            key.expires.isoformat() if key.expires else "never",
            "yes" if key.admin else "",
        )
    Console(highlight=False, markup=False).print(table)


@key_app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id, as listed.")],
    file: _File = _DEFAULT,
) -> None:
    """Remove a key: new requests with it are refused; running ones may finish."""
    with errors_in_one_line(OSError), KeysFile(file) as keys_file:
        others = [key for key in keys_file.keys if key.id != key_id]
        if len(others) == len(keys_file.keys):
            raise ConfigError(f"{file} has no key {key_id}; `headway key list` shows them")
        keys_file.keys = others
        keys_file.save()
    print(f"key {key_id} is revoked", file=sys.stderr)
