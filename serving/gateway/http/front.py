"""Which way does a request go in the gateway, and how does it end if nobody answers it?

Our own listener asks it for what answers a request that runs a model, and a token passes through
nothing here. For all else, and behind Ray Serve's proxy, it is the outermost ASGI application.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Router
from starlette.types import Message, Receive, Scope, Send

from serving.config import Config
from serving.gateway.http.connections import Connections
from serving.gateway.http.errors import ApiError, internal_error
from serving.gateway.http.origins import Origins
from serving.gateway.http.own_headers import (
    find_request_id,
    own_headers,
    request_id_of,
    set_own_headers,
)
from serving.gateway.http.reply.client import Client, ClientEvents

logger = logging.getLogger(__name__)

# Below it a path may have escapes: ids of models contain slashes.
_MODELS = b"/v1/models/"


class ModelApp(Protocol):
    """What runs a model: an ASGI application that our own listener can do without ASGI."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...
    def open(self, scope: Scope, client: Client) -> ClientEvents: ...


class Front:
    """Answers by path: posts to one of `models` by its application, all else by `routes`.

    Errors are in OpenAI's form.

    Paths are compared as they are sent. A proxy may guard `/headway/`, and what it does not take
    for that is not served as that. A slash at the end makes no difference.
    """

    def __init__(
        self,
        config: Config,
        routes: Sequence[BaseRoute],
        connections: Connections,
        models: Mapping[str, ModelApp],
        *,
        behind_serve: bool = False,
        is_for_anybody: Callable[[str], bool] = lambda path: path.startswith(("/v1/", "/health")),
    ) -> None:
        """`routes` has to name the paths of `models`, too, with the methods that they take.

        Where no key is needed, web pages of anybody may call a path that `is_for_anybody`.

        `connections` are those of the listener in front. Ray Serve's server, which may be there
        instead, gives every request an id and tells it itself.
        """
        self.connections = connections
        self._router = Router(routes, redirect_slashes=False)
        self._models = models
        self._is_for_anybody = is_for_anybody
        self._tells_id = not behind_serve
        self._origins = Origins(config, self._router)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._router(scope, receive, send)  # the server's start and stop
            return
        self._set_own_headers(scope)
        try:
            await self._answer(scope, receive, send)
        except ApiError as error:
            await send_error(scope, send, error)
        except HTTPException as error:
            await send_error(scope, send, _from_router(scope, error))
        except ClientDisconnect:
            return  # there is nobody to answer
        except Exception as error:
            await _apologise(scope, send, error)

    def open(self, scope: Scope, client: Client) -> ClientEvents | None:
        """Return what answers a request that runs a model; None for others, which ASGI serves."""
        path = scope["path"].rstrip("/")
        if scope["method"] != "POST" or (model_app := self._models.get(path)) is None:
            return None
        if b"%" in scope["raw_path"]:
            return None
        scope["path"] = path
        self._set_own_headers(scope)
        return model_app.open(scope, client)

    def _set_own_headers(self, scope: Scope) -> None:
        headers = scope["headers"]
        set_own_headers(
            scope,
            find_request_id(headers),
            self._origins.reply_headers(headers),
            tells_id=self._tells_id,
        )

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] = _own_path(scope)
        scope["root_path"] = ""
        if scope["method"] == "POST" and (model_app := self._models.get(path)) is not None:
            await model_app(scope, receive, send)
            return

        async def send_with_own_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *own_headers(scope)]
            await send(message)

        if self._origins.is_preflight(scope):
            await self._origins.answer_preflight(scope, receive, send_with_own_headers)
            return
        if not self._is_for_anybody(path):
            self._origins.check_is_own(scope["headers"])
        scope["app"] = self  # then Starlette's router raises where it finds nothing
        await self._router(scope, receive, send_with_own_headers)


def _own_path(scope: Scope) -> str:
    """Return the path below our root. Raise `ApiError` 404 for one with escapes, but for ids."""
    root: str = scope.get("root_path", "").rstrip("/")
    path: str = scope["path"].removeprefix(root)
    raw: bytes = (scope.get("raw_path") or b"").removeprefix(root.encode())
    if b"%" in raw and not raw.startswith(_MODELS):
        raise _not_found(scope)
    return path.rstrip("/") or "/"


def _not_found(scope: Scope) -> ApiError:
    return ApiError(
        404, f"{scope['method']} {scope['path']} is not served here.", kind="NotFoundError"
    )


def _from_router(scope: Scope, error: HTTPException) -> ApiError:
    """Return in OpenAI's form that nothing is served there, or not by that method."""
    if error.status_code != 405:
        return _not_found(scope)
    allow = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
    return ApiError(
        405,
        f"{scope['path']} takes {allow}, not {scope['method']}.",
        kind="Method Not Allowed",
        headers=[(b"allow", allow.encode())],
    )


async def send_error(scope: Scope, send: Send, error: ApiError) -> None:
    """Answer with an error."""
    status, headers, body = error.reply(own_headers(scope), scope["path"])
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _apologise(scope: Scope, send: Send, error: Exception) -> None:
    """Answer an exception that nobody expected, and log it, once.

    Where the reply has begun the server breaks it off: it has to be seen to be incomplete.
    """
    name = f"request {request_id_of(scope)}"
    try:
        await send_error(scope, send, internal_error(name))
    except RuntimeError:  # ASGI servers raise it for a second head
        error.add_note(name)
        raise error from None  # the server logs it
    logger.error("%s failed", name, exc_info=error)
