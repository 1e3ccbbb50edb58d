"""Which names may stand under `engine.args`? Those of vLLM's engine, not those of its HTTP server.

The names are read in vLLM's source, as importing it takes many seconds and most of the memory of an
engine. What they may be set to is vLLM's to say, when an engine starts.
"""

import ast
import difflib
import functools
import importlib.util
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from serving.config import ConfigError

_ENGINE = ("engine/arg_utils.py", ("EngineArgs", "AsyncEngineArgs"))
_API = ("entrypoints/launchers/cli_args.py", ("BaseFrontendArgs",))  # of its OpenAI layer
_SERVER = ("entrypoints/launchers/cli_args.py", ("FrontendArgs",))  # of the HTTP server around it

# What of the server's takes effect in an engine all the same.
_ALLOWED = frozenset(("enable_flash_late_interaction",))
# What of the OpenAI layer's does not, for the gateway stands before it, or would spoil replies.
_REFUSED = frozenset(("sse_keep_alive_interval", "tokens_only"))
_LIST = re.compile(r"(list|tuple|set|Sequence)\b")
OUR_KEYS = {  # by what vLLM's server calls them
    "host": "gateway.host",
    "port": "gateway.port",
    "api_key": "auth.keys_file",
    "allow_credentials": "gateway.cors_origins",
    "allowed_headers": "gateway.cors_origins",
    "allowed_methods": "gateway.cors_origins",
    "allowed_origins": "gateway.cors_origins",
    "enable_ssl_refresh": "gateway.tls_cert_file",
    "ssl_certfile": "gateway.tls_cert_file",
    "ssl_keyfile": "gateway.tls_key_file",
    "h11_max_header_count": "gateway.max_head_bytes",
    "h11_max_incomplete_event_size": "gateway.max_head_bytes",
    "sse_keep_alive_interval": "gateway.keepalive_s",
}


def check_engine_arguments(names: Iterable[str]) -> None:
    """Raise `ConfigError` for a name that vLLM's engine does not have.

    Where no vLLM is installed, or one whose source is not as expected, nothing is refused.
    """
    engine, server = engine_names(), server_names()
    for name in names if engine else ():
        key = f"engine.args.{name}"
        if name in OUR_KEYS:
            raise ConfigError(f"{key}: set `{OUR_KEYS[name]}` instead")
        if name in server:
            raise ConfigError(
                f"{key}: belongs to vLLM's own HTTP server, in whose place Headway's gateway stands"
            )
        if name not in engine:
            close = difflib.get_close_matches(name.replace("-", "_"), engine, 1)
            raise ConfigError(
                f"{key}: vLLM has no such engine argument"
                + (f"; did you mean {close[0]}?" if close else "")
            )


def engine_names() -> frozenset[str]:
    """Return the names that an engine takes; empty if they are not known."""
    names = _names(*_ENGINE)
    return (names | _names(*_API) | _ALLOWED) - _REFUSED if names else names


def server_names() -> frozenset[str]:
    """Return the names that only vLLM's HTTP server takes, and those that an engine must not."""
    return (_names(*_SERVER) - _ALLOWED) | _REFUSED


def num_values(name: str) -> int:
    """Return how many values an argument takes at most on vLLM's command line; 1 if not known."""
    for source in (_ENGINE, _API, _SERVER):
        if (kind := _fields(*source).get(name)) is not None:
            if kind.partition("|")[0].strip() == "bool":
                return 0
            return sys.maxsize if _LIST.match(kind) else 1
    return 1


def _names(file: str, classes: tuple[str, ...]) -> frozenset[str]:
    return frozenset(_fields(file, classes))


@functools.cache
def _fields(file: str, classes: tuple[str, ...]) -> dict[str, str]:
    """Return the fields of the classes in vLLM's file and their types; empty if there are none."""
    spec = importlib.util.find_spec("vllm")
    for folder in spec.submodule_search_locations or () if spec else ():
        try:
            tree = ast.parse((Path(folder) / file).read_text(encoding="utf-8"))
        except OSError:
            continue
        return {
            field.target.id: ast.unparse(field.annotation)
            for node in tree.body
            if isinstance(node, ast.ClassDef) and node.name in classes
            for field in node.body
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        }
    return {}
