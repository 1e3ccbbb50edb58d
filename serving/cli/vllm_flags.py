"""What do options mean that are not ours? They are vLLM's, and its own parser reads them.

Its parser comes with most of vLLM, which takes many seconds and half a gigabyte to import. So names
are checked here first, against vLLM's source, and the parser runs in a process of its own:
`python -m serving.cli.vllm_flags FLAG...` prints what it makes of them, as JSON.
"""

import dataclasses
import difflib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import typer
import typer.core

from serving.config import ConfigError
from serving.planning.engine_arguments import (
    OUR_KEYS,
    engine_names,
    num_values,
    server_names,
)

FLAGS = "headway.vllm_flags"  # in `typer.Context.meta`
_TIMEOUT_S = 300.0  # for vLLM to be imported, on a machine that does much else


class PassingCommand(typer.core.TyperCommand):
    """A command whose unknown options are put aside, with their values, for vLLM.

    Raises a usage error, which takes milliseconds, for names that vLLM does not have either.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ours = {
            name: 0 if getattr(param, "is_flag", False) else 1
            for param in self.get_params(ctx)
            for name in (*param.opts, *param.secondary_opts)
            if name.startswith("-")
        }
        own, flags = set_aside(args, ours)
        if not ctx.resilient_parsing:
            check_names(flags, ours)
        ctx.meta[FLAGS] = flags
        return super().parse_args(ctx, own)


def set_aside(args: Sequence[str], ours: dict[str, int]) -> tuple[list[str], list[str]]:
    """Return the arguments that are ours, and those that are vLLM's, each with their values.

    `ours` are our options and the number of their values.
    """
    own: list[str] = []
    others: list[str] = []
    left = list(args)
    while left:
        arg = left.pop(0)
        if arg == "--":
            own += [arg, *left]
            break
        name, equals, value = arg.partition("=")
        if name.startswith("--"):
            name = name.replace("_", "-")  # as vLLM takes them
        if not _is_option(arg) or name in ours:
            own.append(name + equals + value)
            for _ in range(0 if equals else ours.get(name, 0)):
                own += left[:1]
                del left[:1]
            continue
        others.append(arg)
        most = 0 if equals else num_values(_key(name))
        while left and most > 0 and not _is_option(left[0]):
            others.append(left.pop(0))
            most -= 1
    return own, others


def _is_option(arg: str) -> bool:
    return arg.startswith("-") and not arg[1:].replace(".", "", 1).isdecimal() and len(arg) > 1


def _key(name: str) -> str:
    """Return the Python name of vLLM's `--option`, `--no-option` or `--option.key`."""
    return name.removeprefix("--").partition(".")[0].replace("-", "_").removeprefix("no_")


def check_names(flags: Iterable[str], ours: Collection[str]) -> None:
    """Raise a usage error for an option that vLLM's engine does not have."""
    engine, server = engine_names(), server_names()
    for flag in flags:
        name = flag.partition("=")[0]
        if not name.startswith("--"):
            continue  # a value, or a short form, which only the parser knows
        key = _key(name)
        if key in OUR_KEYS:
            _refuse(f"{name}: set {OUR_KEYS[key]} instead, e.g. with --set")
        if key in server:
            _refuse(f"{name}: belongs to vLLM's own HTTP server, in whose place the gateway stands")
        if key not in engine and key.removeprefix("no_") not in engine:
            if not engine:
                _refuse(f"{name}: no such option, and vLLM, which may have it, is not installed")
            known = [*ours, *(f"--{each.replace('_', '-')}" for each in sorted(engine))]
            close = difflib.get_close_matches(name.replace("_", "-"), known, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            _refuse(f"{name}: no such option, of Headway or of vLLM{hint}")


def _refuse(message: str) -> NoReturn:
    print(f"headway: {message}", file=sys.stderr)
    raise typer.Exit(2)


def read_flags(flags: Sequence[str]) -> dict[str, Any]:
    """Return what vLLM's parser makes of its options, by their Python names.

    Takes as long as importing vLLM. Raise `ConfigError` with its message if it refuses them.
    """
    if sys.stderr.isatty():
        print("asking vLLM's own parser, which takes some seconds to import …", file=sys.stderr)
    environment = os.environ | {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "PYTHONPATH": os.pathsep.join(
            filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")))
        ),
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "serving.cli.vllm_flags", *flags],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"vLLM took more than {_TIMEOUT_S:.0f} s to read {flags[0]}") from None
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise ConfigError(f"vLLM cannot read {flags[0]}: {said[-1]}") from None
    if "error" in answer:
        raise ConfigError(f"vLLM refuses it: {answer['error']}")
    return answer["values"]


def _parse(flags: list[str]) -> dict[str, Any]:
    """Return what vLLM's own parser reads in these flags, of those alone that are given."""
    import argparse

    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(message)

    validate_parsed_serve_args(make_arg_parser(Parser()).parse_args(flags))
    parser = make_arg_parser(Parser(argument_default=argparse.SUPPRESS))
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        if action.type is not None:
            action.type = functools.partial(_plain, action.type)
    return vars(parser.parse_args(flags))


def _plain(kind: Any, text: str) -> Any:
    """Return what an option's type makes of a value; where that is an object, as it was given.

    vLLM makes it of that once more, in the engine; its fields are more than it takes.
    """
    value = kind(text)
    return json.loads(text) if dataclasses.is_dataclass(value) else value


def _as_json(value: Any) -> Any:
    """Return the plain form of a value that vLLM's parser has made."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, set | frozenset | tuple):
        return list(value)
    if hasattr(value, "value"):  # an enum's
        return value.value
    return str(value)


def _answer(flags: list[str]) -> Iterator[str]:
    try:
        yield json.dumps({"values": _parse(flags)}, default=_as_json)
    except (ValueError, TypeError, KeyError) as error:
        yield json.dumps({"error": " ".join(str(error).split())})


if __name__ == "__main__":
    print(*_answer(sys.argv[1:]), sep="\n")
