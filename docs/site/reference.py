"""Writes the pages of `docs/reference` from the code: `make docs`; a test finds old ones.

config.md   every key of the configuration, from the pydantic models
cli.md      every command and option, from the command line itself
http.md     endpoints, headers and errors: `docs.site.http_page`
"""

import subprocess
import sys
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from docs.site.http_page import http_page
from serving.config import Config

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "reference"

_ABOUT_CONFIG = """# Configuration

Keys as they stand under `applications[0].args` of a config file, or after `--set`, dotted:
`--set gateway.port=9000`. Written from the code by `make docs`. Old names of keys are accepted for
one release, with a warning that tells the new one.
"""
_ABOUT_CLI = """# Command line

Written from the code by `make docs`.
"""


def config_page() -> str:
    """Return the page of the configuration, in Markdown."""
    lines: list[str] = []
    _add_section(lines, Config, "")
    return _ABOUT_CONFIG + "\n".join(lines) + "\n"


def cli_page() -> str:
    """Return the page of the command line, in Markdown, as Typer writes it."""
    write = (
        "-m",
        "typer",
        "--app",
        "main",
        "serving.cli.main",
        "utils",
        "docs",
        "--name",
        "headway",
    )
    done = subprocess.run(
        [sys.executable, *write], cwd=ROOT, capture_output=True, text=True, check=True
    )
    body = done.stdout.partition("\n")[2]  # without its own title
    return _ABOUT_CLI + body.rstrip() + "\n"


def _add_section(lines: list[str], section: type[BaseModel], path: str) -> None:
    """Add a table of a section's keys, and the sections within it after it."""
    inner: list[tuple[str, type[BaseModel]]] = []
    about = (section.__doc__ or "").strip().partition("\n\n")[0]
    lines += ["", f"## `{path}`" if path else "## Top level", "", " ".join(about.split()), ""]
    lines += ["| key | type | default | |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        key = f"{path}.{name}" if path else name
        model, suffix = _model_in(field.annotation)
        if model is not None:
            inner.append((key + suffix, model))
        kind = f"[section](#{_anchor(key + suffix)})" if model else f"`{_type(field.annotation)}`"
        about = " ".join((field.description or "").split()) + _bounds(field)
        lines.append(f"| `{key}` | {_cell(kind)} | {_cell(_default(field))} | {_cell(about)} |")
    for key, model in inner:
        _add_section(lines, model, key)


def _model_in(annotation: Any) -> tuple[type[BaseModel] | None, str]:
    """Return the section that a key holds, alone, in a list or by name, and how that is written."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, ""
    suffix = {tuple: "[]", list: "[]", dict: ".NAME"}.get(typing.get_origin(annotation) or type)
    for argument in typing.get_args(annotation):
        found, rest = _model_in(argument)
        if found is not None:
            return found, (suffix or "") + rest
    return None, ""


def _type(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Annotated:
        return _type(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(_type(each) for each in typing.get_args(annotation))
    if typing.get_origin(annotation) is typing.Literal:
        return " or ".join(str(value) for value in typing.get_args(annotation))
    if typing.get_origin(annotation) in (tuple, list, frozenset):
        return f"list of {_type(typing.get_args(annotation)[0])}"
    if typing.get_origin(annotation) is dict:
        key, value = typing.get_args(annotation)
        return f"mapping of {_type(key)} to {_type(value)}"
    if annotation is type(None):
        return "unset"
    return "anything" if annotation is Any else str(annotation.__name__).lower()


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is PydanticUndefined:
        return "required"
    if default is None:
        return "unset"
    first = default[0] if isinstance(default, tuple) and default else default
    if isinstance(first, BaseModel) or default in ((), {}):
        return ""
    if isinstance(default, tuple):
        return "`" + ", ".join(str(each) for each in default) + "`"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _bounds(field: FieldInfo) -> str:
    """Return the numbers within which a value has to be, in words."""
    names = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    found = [
        f"{words} {value:g}" if value < 1e5 else f"{words} {value:,.0f}"
        for each in field.metadata
        for name, words in names.items()
        if (value := getattr(each, name, None)) is not None
    ]
    return f" ({', '.join(found)})" if found else ""


def _anchor(key: str) -> str:
    return "".join(each for each in key.lower() if each.isalnum() or each in "_-")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


PAGES = {"config.md": config_page, "cli.md": cli_page, "http.md": http_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page())
