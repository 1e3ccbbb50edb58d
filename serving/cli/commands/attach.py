"""What does `headway attach` do? One gateway in this process, before servers that run already.

No Ray, no engines, no GPU: what is started here is an HTTP listener and a router.
"""

import asyncio
import gc
import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from router import EngineInfo
from serving.cli.config_file import ConfigFile
from serving.cli.errors import errors_in_one_line
from serving.cli.options import (
    Host,
    Insecure,
    LogDir,
    LogFormat,
    LogLevel,
    Policy,
    Port,
    Set,
    load_file,
)
from serving.cluster.logs import use_log_level
from serving.cluster.processes import STOP_SIGNALS
from serving.config import Config, ConfigError
from serving.gateway.http.endpoint import check_is_guarded, check_port_is_free, is_loopback

if TYPE_CHECKING:
    from serving.gateway.app import Gateway
    from serving.gateway.http.listener import Listener

_WATCH_S = 0.2  # between two looks at which servers are there
_ECHO_S = 0.5  # a signal that follows within it is the same one: `serving.cli.interrupts`
_LAST_WORDS_S = 1.0  # for error events to be written
_SUFFIXES = (".yaml", ".yml")

Servers = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="URL...|CONFIG.yaml",
        help="Servers that run already, e.g. http://a:8000 http://b:8000; or a config file that "
        "lists them under `external`.",
    ),
]
KeyEnv = Annotated[
    str | None,
    typer.Option(help="Environment variable that holds the API key which all the servers want."),
]


def attach(
    ctx: typer.Context,
    servers: Servers = None,
    key_env: KeyEnv = None,
    host: Host = None,
    port: Port = None,
    policy: Policy = None,
    set_: Set = None,
    insecure: Insecure = False,
    log_dir: LogDir = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> None:
    """Serve from `vllm serve` or other OpenAI-compatible servers that run already, until Ctrl-C."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    with errors_in_one_line():
        file = _load(ctx, servers or [], key_env)
        config = file.config
        check_is_guarded(
            file.host,
            has_keys=config.auth.keys_file is not None,
            insecure=config.gateway.insecure,
        )
        check_port_is_free(file.host, file.port)
        import uvloop  # late: most commands need no event loop

        uvloop.run(_serve(file, console))


def _load(ctx: typer.Context, servers: list[str], key_env: str | None) -> ConfigFile:
    """Return the configuration. Raise `ConfigError` for one that `attach` cannot serve."""
    files = [each for each in servers if each.endswith(_SUFFIXES)]
    urls = [each for each in servers if each not in files]
    if len(files) > 1:
        raise ConfigError(f"{files[1]}: one config file at most")
    assignments = [*(ctx.params.get("set_") or ()), "gateway.front=own"]
    if urls:
        named: list[dict[str, Any]] = [{"url": url} for url in urls]
        if key_env is not None:
            named = [{**each, "key_env": key_env} for each in named]
        assignments.append(f"external={json.dumps(named)}")
    elif key_env is not None:
        raise ConfigError("--key-env: is for servers that are named by their URLs")
    ctx.params["what"] = files[0] if files else None
    ctx.params["set_"] = assignments
    file = load_file(ctx)
    config = file.config
    if not config.external:
        raise ConfigError("no servers: name their URLs, or list them under `external`")
    if config.model or config.models:
        raise ConfigError(
            "model: attach starts no engines; `headway serve` does, beside those of `external`"
        )
    if config.gateway.replicas not in (1, "auto"):
        raise ConfigError(
            f"gateway.replicas: {config.gateway.replicas}: attach runs one gateway, without Ray"
        )
    gateway = config.gateway.model_copy(update={"replicas": 1})
    return ConfigFile(file.serve, config.model_copy(update={"gateway": gateway}))


async def _serve(file: ConfigFile, console: Console) -> None:
    """Serve until a signal, then drain; a second one ends that."""
    from serving.gateway.app import Gateway  # late: most commands need no gateway
    from serving.gateway.http.listener import Listener

    config = file.config
    use_log_level(config.log)
    stops = _Stops()
    gateway = Gateway(config, f"attach-{file.port}", served_names=_names(config))
    listeners = [Listener(gateway.app, config.gateway)]
    if gateway.metrics_port:
        listeners.append(Listener(gateway.own_app, config.gateway, gateway.metrics_port))
    for listener in listeners:
        await listener.start()
    gc.collect()
    gc.freeze()  # what exists by now stays: it need not be looked at while tokens wait
    urls = ", ".join(server.url for server in config.external)
    console.print(f"listening: {file.url}/v1\nbefore {urls}")
    if not is_loopback(file.host) and config.auth.keys_file is None:
        console.print("WARNING: open to the network, and nobody needs a key (auth.keys_file)")
    console.print("Ctrl-C drains and stops; the servers stay as they are.")
    watching = asyncio.ensure_future(_tell_servers(gateway, console))
    await stops.first.wait()
    watching.cancel()
    timeout_s = config.engine.drain_timeout_s
    console.print(
        f"draining: running streams may finish, for up to {timeout_s:.0f} s "
        "(Ctrl-C again to stop at once)"
    )
    gateway.close_feeds()
    stopping = asyncio.ensure_future(_stop(listeners))
    hurrying = asyncio.ensure_future(stops.second.wait())
    await asyncio.wait([stopping, hurrying], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    hurrying.cancel()
    gateway.close()
    await asyncio.wait([stopping], timeout=_LAST_WORDS_S)


def _names(config: Config) -> tuple[str, ...]:
    """Return the names that will be served, as far as all servers' are configured."""
    names = [server.model for server in config.external if server.model is not None]
    return tuple(dict.fromkeys(names)) if len(names) == len(config.external) else ()


async def _tell_servers(gateway: "Gateway", console: Console) -> None:
    """Print which servers are there whenever that changes."""
    before: dict[str, EngineInfo] | None = None
    while True:
        infos = dict(gateway.driver.engines.infos)
        if before is None or infos.keys() != before.keys():
            if before is not None or infos:
                console.print(_servers_text(infos, len(gateway.config.external)))
            before = infos
        await asyncio.sleep(_WATCH_S)


def _servers_text(infos: dict[str, EngineInfo], num_servers: int) -> str:
    """Return how many servers are there, and for which models."""
    by_model: dict[str, list[str]] = {}
    for name, info in infos.items():
        by_model.setdefault(info.model, []).append(name)
    models = "; ".join(f"{model}: {', '.join(names)}" for model, names in by_model.items())
    text = f"{len(infos)} of {num_servers} servers ready"
    return f"{text} ({models})" if models else text


async def _stop(listeners: list["Listener"]) -> None:
    for listener in listeners:
        await listener.stop()


class _Stops:
    """The first signal, and a second one."""

    def __init__(self) -> None:
        self.first, self.second = asyncio.Event(), asyncio.Event()
        self._last_s = -_ECHO_S
        for signum in STOP_SIGNALS:
            asyncio.get_running_loop().add_signal_handler(signum, self._on_signal)

    def _on_signal(self) -> None:
        last_s, self._last_s = self._last_s, time.monotonic()
        if self._last_s - last_s >= _ECHO_S:
            (self.second if self.first.is_set() else self.first).set()
