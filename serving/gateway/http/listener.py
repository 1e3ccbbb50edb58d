"""How does a gateway listen for HTTP by itself?"""

import asyncio
import functools
import socket
import ssl

import uvicorn

from serving.config import ConfigError, GatewayConfig
from serving.file_watch import FileWatch
from serving.gateway.http.front import Front
from serving.gateway.http.guard import ClientLimits, GuardedProtocol


class Listener:
    """uvicorn on a TCP port that several gateways of one node share (SO_REUSEPORT)."""

    def __init__(self, app: Front, config: GatewayConfig, port: int | None = None) -> None:
        """Without a `port` it is the configured one. Raise `ConfigError` for a bad certificate."""
        tls = make_tls_context(config)
        self._socket = _bind(config.host, config.port if port is None else port)
        limits = ClientLimits(
            config.head_timeout_s,
            config.body_timeout_s,
            config.stall_timeout_s,
            config.max_head_bytes,
        )
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=functools.partial(  # type: ignore[arg-type]
                    GuardedProtocol, limits=limits, counted=app.connections, open_call=app.open
                ),
                ssl_context_factory=None if tls is None else lambda *_: tls,
                ws="none",
                lifespan="off",
                interface="asgi3",
                access_log=False,
                log_config=None,
                server_header=False,
                proxy_headers=False,  # nothing goes by the client's address or scheme
                timeout_keep_alive=75,
            )
        )
        self._task: asyncio.Task[None] | None = None
        self._watches: list[FileWatch] = []
        if tls is not None:
            self._watches = [
                FileWatch(path, lambda _: _read_certificate(config), lambda _: _use(config, tls))
                for path in (config.tls_cert_file, config.tls_key_file)
                if path is not None
            ]

    async def start(self) -> None:
        """Return once connections are accepted."""
        self._task = asyncio.create_task(self._server.serve([self._socket]))
        while not self._server.started:
            if self._task.done():
                self._task.result()
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """Accept no more connections, let open responses finish, then close."""
        for watch in self._watches:
            watch.close()
        self._server.should_exit = True
        if self._task is not None:
            await self._task


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With protocol 0 asyncio would not switch off Nagle's algorithm: delays of 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind((host, port))
    listener.setblocking(False)
    return listener


def make_tls_context(config: GatewayConfig) -> ssl.SSLContext | None:
    """Return what the listener encrypts with, None if it does not.

    Raise `ConfigError` for a certificate that cannot be used.
    """
    if config.tls_cert_file is None:
        return None
    return _read_certificate(config)


def _read_certificate(config: GatewayConfig) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    _use(config, context)
    return context


def _use(config: GatewayConfig, context: ssl.SSLContext) -> None:
    """Load certificate and key into `context`: new connections get them, open ones go on."""
    assert config.tls_cert_file is not None
    try:
        context.load_cert_chain(
            config.tls_cert_file, config.tls_key_file, password=_refuse_passphrase
        )
    except (OSError, ValueError) as error:  # `ssl.SSLError` among them
        files = f"{config.tls_cert_file}, {config.tls_key_file}"
        raise ConfigError(f"gateway.tls_cert_file: {files} cannot be used: {error}") from None


def _refuse_passphrase() -> str:
    """Rather than ask the terminal, where nobody may sit."""
    raise ValueError("the key needs a passphrase")
