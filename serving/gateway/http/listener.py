"""How does a gateway listen for HTTP by itself?"""

import asyncio
import functools
import socket

import uvicorn
from starlette.types import ASGIApp

from serving.config import GatewayConfig
from serving.gateway.http.guard import ClientLimits, GuardedProtocol


class Listener:
    """uvicorn on a TCP port that several gateways of one node share (SO_REUSEPORT)."""

    def __init__(self, app: ASGIApp, config: GatewayConfig) -> None:
        self._socket = _bind(config.host, config.port)
        limits = ClientLimits(
            config.head_timeout_s,
            config.body_timeout_s,
            config.stall_timeout_s,
            config.max_head_bytes,
        )
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=functools.partial(GuardedProtocol, limits=limits),  # type: ignore[arg-type]
                limit_concurrency=config.max_connections,
                ws="none",
                lifespan="off",
                interface="asgi3",
                access_log=False,
                log_config=None,
                server_header=False,
                timeout_keep_alive=75,
            )
        )
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Return once connections are accepted."""
        self._task = asyncio.create_task(self._server.serve([self._socket]))
        while not self._server.started:
            if self._task.done():
                self._task.result()
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """Accept no more connections, let open responses finish, then close."""
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
