"""What do a Ray Serve config file and the command line's options say together?

`serve run FILE` and `headway serve FILE` read the same file, in which Headway's configuration is
the application's `args`. Ray ignores keys that it does not know; here they are errors.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from serving.config import Config, ConfigError, parse, resolved
from serving.config.renamed import current_args, current_import_path

IMPORT_PATH = "serving.cluster.application:build"
_APPLICATION = "applications.0"
_OUTER_KEYS = ("proxy_location", "http_options", "logging_config", "applications")
_APPLICATION_KEYS = (
    "name",
    "route_prefix",
    "import_path",
    "args",
    "runtime_env",
    "logging_config",
)
_DEFAULTS: dict[str, Any] = {
    "http_options": {"host": "127.0.0.1", "port": 8000},  # HAProxy's, if it is the front
    "applications": [{"name": "headway", "import_path": IMPORT_PATH, "args": {}}],
}


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """What to launch: Serve's keys as they were written, Headway's parsed."""

    serve: dict[str, Any]  # the whole file, as Ray Serve's ServeDeploySchema has it
    config: Config

    @property
    def application(self) -> dict[str, Any]:
        """The file's only application."""
        return self.serve["applications"][0]

    @property
    def name(self) -> str:
        return self.application.get("name", "default")

    @property
    def haproxy(self) -> bool:
        return self.config.gateway.front == "haproxy"

    @property
    def proxy_location(self) -> Literal["Disabled", "HeadOnly", "EveryNode"]:
        """Where Serve's proxies run: nowhere if the gateway listens itself."""
        return self.serve.get("proxy_location", "EveryNode") if self.haproxy else "Disabled"

    @property
    def host(self) -> str:
        """The address that clients connect to."""
        return self.serve["http_options"]["host"] if self.haproxy else self.config.gateway.host

    @property
    def port(self) -> int:
        return self.serve["http_options"]["port"] if self.haproxy else self.config.gateway.port

    @property
    def url(self) -> str:
        """The URL of the OpenAI endpoint for clients on this machine, without `/v1`."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        prefix = (self.application.get("route_prefix") or "/") if self.haproxy else "/"
        scheme = "http" if self.config.gateway.tls_cert_file is None else "https"
        return f"{scheme}://{host}:{self.port}{prefix.rstrip('/')}"

    def metrics_ports(self, num_gateways: int) -> Iterable[int]:
        """Return the ports on which so many gateways answer for themselves."""
        first = self.config.gateway.metrics_port
        return range(first, first + num_gateways) if first else ()


def load_config_file(path: Path | None, options: Mapping[str, Any]) -> ConfigFile:
    """Return what `path` and `options` say; raise `ConfigError`, naming the key.

    `options` has values by dotted key, such as `gateway.front`; they override
    the file. `host` and `port` apply to whatever listens. Without a file the
    defaults are those of `deploy/cpu.yaml`.
    """
    serve = _read_yaml(path) if path else {}
    for key in serve.keys() - set(_OUTER_KEYS):
        raise ConfigError(f"{key}: unknown key, or not taken by `headway serve`")
    serve = {**_DEFAULTS, **serve}
    serve["http_options"] = {
        **_DEFAULTS["http_options"],
        **_check_mapping(serve["http_options"], "http_options"),
    }
    application = _check_application(serve)
    args = _check_mapping(application.get("args") or {}, f"{_APPLICATION}.args")
    if path:
        args = {"watch_file": str(path.absolute()), **resolved(args, path.absolute().parent)}
    listener = {key: options[key] for key in ("host", "port") if key in options}
    for key, value in options.items():
        if key not in listener:
            args = _with_value(args, key.split("."), value, key)
    args = resolved(args, Path.cwd())
    haproxy = parse(args).gateway.front == "haproxy"
    args = current_args(args)  # what is launched need not warn again
    if "gateway.front" in options:  # the option moves the whole front, not just our end of it
        serve["proxy_location"] = "EveryNode" if haproxy else "Disabled"
    elif haproxy and serve.get("proxy_location") == "Disabled":
        raise ConfigError("proxy_location: Disabled leaves gateway.front haproxy without HAProxy")
    elif not haproxy and serve.get("proxy_location", "Disabled") != "Disabled":
        raise ConfigError("proxy_location: must be Disabled with gateway.front own")
    for key, value in listener.items():
        if haproxy:
            serve["http_options"] = {**serve["http_options"], key: value}
        else:
            args = _with_value(args, ["gateway", key], value, key)
    serve["applications"] = [{**application, "args": args}]
    return ConfigFile(serve, parse(args))


def check_with_ray(file: ConfigFile) -> None:
    """Raise `ConfigError` for what Ray Serve's own schema refuses. This imports Ray Serve."""
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    try:
        ServeDeploySchema.model_validate(file.serve)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ConfigError(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not a text file in UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or "applications" not in content:
        raise ConfigError(
            f"{path}: is not a Ray Serve config file: it has no `applications` "
            f"(Headway's keys stand under {_APPLICATION}.args)"
        )
    return content


def _check_application(serve: dict[str, Any]) -> dict[str, Any]:
    """Return the one application of the file, its import path by the present name."""
    applications = serve["applications"]
    if not isinstance(applications, list) or len(applications) != 1:
        raise ConfigError("applications: must be a list of exactly one")
    application = _check_mapping(applications[0], _APPLICATION)
    for key in application.keys() - set(_APPLICATION_KEYS):
        raise ConfigError(f"{_APPLICATION}.{key}: unknown key, or not taken by `headway serve`")
    import_path = current_import_path(application.get("import_path"))
    if import_path != IMPORT_PATH:
        raise ConfigError(f"{_APPLICATION}.import_path: {import_path!r} is not {IMPORT_PATH}")
    return {**application, "import_path": import_path}


def _check_mapping(value: Any, key: str) -> dict[str, Any]:
    """Return `value`; raise `ConfigError` unless it is a mapping."""
    if not isinstance(value, dict):
        raise ConfigError(f"{key}: must be a mapping of keys to values")
    return value


def _with_value(tree: dict[str, Any], path: list[str], value: Any, key: str) -> dict[str, Any]:
    """Return a copy of `tree` with `value` at `path`."""
    name, *rest = path
    if not rest:
        return {**tree, name: value}
    return {**tree, name: _with_value(_check_mapping(tree.get(name) or {}, key), rest, value, key)}
