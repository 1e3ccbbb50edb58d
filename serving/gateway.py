"""The OpenAI-compatible front: HTTP in, exchanges through the driver, HTTP out."""

import asyncio
import contextlib
import functools
import logging
import re
import time
import uuid
from collections.abc import Callable

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from router.core import Router
from router.types import RequestClass, Usage
from serving.bodies import Bodies
from serving.budgets import Ask, Leases
from serving.config import Config, read
from serving.driver import Driver
from serving.endpoint import is_loopback
from serving.errors import ApiError, from_rejection
from serving.exchange import EngineFailed, Exchange, Rejected
from serving.flight import Reader
from serving.intake import ENDPOINTS, Intake
from serving.keys import read_keys
from serving.metrics import Metrics
from serving.providers import Providers
from serving.response_cache import Replay, ResponseCache
from serving.tenants import Caller, Tenants
from serving.watch import FileWatch
from serving.wire import Headers

logger = logging.getLogger(__name__)

# What vLLM's API layer reads of a request's headers.
_FORWARDED = re.compile(rb"traceparent|tracestate|x-session-id|x-data-parallel-rank")
_REQUEST_ID = re.compile(rb"[\w.:-]{1,128}")


class Gateway:
    """One gateway: the ASGI application and all behind it, on one event loop.

    Made on the running loop. Raises `ConfigError` if its keys cannot be read.
    """

    def __init__(self, config: Config, gateway_id: str, ask: Ask | None = None) -> None:
        """`ask` reaches the keeper of budgets where several gateways share them."""
        self.config = config
        self.gateway_id = gateway_id
        self.metrics = Metrics()
        self.router = Router(config.router)
        self.driver = Driver(
            self.router,
            gateway_id,
            config.gateway.stream_window_bytes,
            config.gateway.max_record_bytes,
            self.metrics,
        )
        leases = None if ask is None else Leases(gateway_id, ask, self._on_grant)
        self.providers = Providers(
            self.router, self.driver, config.gateway.stream_window_bytes, leases
        )
        self.driver.providers = self.providers
        self.providers.use(config)
        self.intake = Intake()
        self.bodies = Bodies(config.gateway)
        self.cache = ResponseCache(config, self.driver)
        self.watches: dict[str, FileWatch] = {}
        self.tenants = self._make_tenants()
        self.started_s = int(time.time())
        self.metrics.watch(self.state)
        self.app = self._build()

    def _make_tenants(self) -> Tenants:
        config = self.config
        if (keys_file := config.auth.keys_file) is None:
            if config.gateway.front == "own" and not is_loopback(config.gateway.host):
                logger.warning(
                    "open to the network on %s, and nobody needs a key: set auth.keys_file",
                    config.gateway.host,
                )
            tenants = Tenants(config, None)
        else:
            tenants = Tenants(config, read_keys(keys_file))
            self.watches["auth.keys_file"] = FileWatch(keys_file, read_keys, tenants.use_keys)
        if (watch_file := config.watch_file) is not None:
            self.watches["watch_file"] = FileWatch(watch_file, read, self._use_config)
        return tenants

    def _use_config(self, config: Config) -> None:
        """Take over from a changed config file what can change while serving.

        Raises `ConfigError` if a provider's key cannot be read or Redis not be used.
        """
        self.cache.use_config(config.cache)
        self.providers.use(config)
        self.tenants.use_configs(config.tenants)

    def _on_grant(self) -> None:
        """Budgets have been leased: see who waits for them."""
        self.driver.execute(self.router.on_tick(time.monotonic()))

    def close(self) -> None:
        """Leave: stop watching files, close the connections to engines."""
        for watch in self.watches.values():
            watch.close()
        self.cache.close()
        self.driver.close()

    def _build(self) -> FastAPI:
        app = FastAPI(title="Headway", openapi_url=None)
        for path in ENDPOINTS:
            # A plain ASGI endpoint: tokens pass through no response object.
            app.router.routes.append(Route(path, _Endpoint(self), methods=["POST"]))
        app.get("/v1/models")(self.models)
        app.get("/health")(self.health)
        app.get("/metrics")(self.prometheus)
        app.get("/headway/state")(self.get_state)
        app.post("/headway/policy")(self.set_policy)
        app.post("/headway/reload")(self.reload)
        app.get("/headway/usage")(self.get_usage)
        app.add_exception_handler(ApiError, _reply_error)
        app.add_exception_handler(404, _no_such_route)
        app.add_exception_handler(405, _no_such_route)
        return app

    # --- the small endpoints ----------------------------------------------

    def state(self) -> dict:
        """Return every engine's snapshot and ledger, the hold queue and the outcomes."""
        return {
            "gateway_id": self.gateway_id,
            "num_open_requests": len(self.driver.exchanges),
            "num_record_bytes": self.driver.records.num_bytes,
            "num_incoming_bytes": self.bodies.num_bytes,
            "tokens_per_byte": self.intake.tokens_per_byte,
            "tenants": self.tenants.state(time.monotonic()),
            "cache": self.cache.state(),
            "files": {name: watch.state() for name, watch in self.watches.items()},
            **self.router.state(time.monotonic()),
        }

    async def get_state(self, request: Request) -> JSONResponse:
        self.tenants.authorize_admin(request.headers.raw)
        return JSONResponse(self.state())

    async def get_usage(self, request: Request) -> JSONResponse:
        """What each tenant has used of this gateway; one without an admin key sees its own."""
        caller = self.tenants.authenticate(request.headers.raw)
        usage = self.tenants.usage()
        if caller is not None and not caller.is_admin:
            usage = {caller.tenant.name: usage[caller.tenant.name]}
        return JSONResponse({"gateway_id": self.gateway_id, "tenants": usage})

    async def reload(self, request: Request) -> JSONResponse:
        """Read keys and config anew now; without this, within a second of a change."""
        self.tenants.authorize_admin(request.headers.raw)
        for watch in self.watches.values():
            await watch.reload()
        return JSONResponse({name: watch.state() for name, watch in self.watches.items()})

    async def models(self, request: Request) -> JSONResponse:
        caller = self.tenants.authenticate(request.headers.raw)
        cards = {
            name: info
            for info in self.driver.engines.values()
            for name in (info.model, *info.aliases)
            if caller is None or caller.tenant.may_use((name,))
        }
        elsewhere = [
            name
            for name in self.providers.models
            if name not in cards and (caller is None or caller.tenant.may_use((name,)))
        ]
        return JSONResponse(
            {
                "object": "list",
                "data": [
                    {
                        "id": name,
                        "object": "model",
                        "created": self.started_s,
                        "owned_by": "headway",
                        "root": info.model,
                        "max_model_len": info.max_model_len,
                    }
                    for name, info in sorted(cards.items())
                ]
                + [
                    {
                        "id": name,
                        "object": "model",
                        "created": self.started_s,
                        "owned_by": "provider",
                    }
                    for name in sorted(elsewhere)
                ],
            }
        )

    async def health(self) -> JSONResponse:
        """200 while at least one engine is connected, or a provider stands in."""
        num_engines = len(self.driver.engines)
        stands_in = "providers only" if self.providers.models else "no engine"
        return JSONResponse(
            {"status": "ok" if num_engines else stands_in, "num_engines": num_engines},
            status_code=200 if num_engines or self.providers.models else 503,
        )

    async def prometheus(self, request: Request) -> Response:
        if not self.config.auth.open_metrics:
            self.tenants.authorize_admin(request.headers.raw)
        return Response(self.metrics.render(), media_type="text/plain; version=0.0.4")

    async def set_policy(self, request: Request) -> JSONResponse:
        """Switch the policy without a restart: `{"policy": "headway", "ablate": ["order"]}`."""
        self.tenants.authorize_admin(request.headers.raw)
        try:
            body = await request.json()
            name, ablate = body["policy"], body.get("ablate", [])
            self.driver.set_policy(name, ablate)
        except (ValueError, KeyError, TypeError) as error:
            raise ApiError(400, f"'policy': {error}", param="policy") from None
        return JSONResponse({"policy": name, "ablate": ablate})

    # --- the token path ---------------------------------------------------

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request to one of `ENDPOINTS`."""
        try:
            caller = self.tenants.authenticate(scope["headers"])
            body = await self.bodies.read(scope, receive)
            if body is None:
                return  # the client left before it had sent its request
            exchange, num_text_bytes = self._admit(scope, body, caller)
            if caller is None:
                await self._answer(exchange, scope, receive, send, [])
            else:
                visit = self.tenants.enter(caller.tenant, exchange.request)
                try:
                    await self._answer(exchange, scope, receive, send, visit.headers)
                finally:
                    self.tenants.leave(visit, _settlement(exchange))
            self.intake.learn(num_text_bytes, exchange.usage)
        except ApiError as error:
            await _send_error(send, error)

    async def _answer(
        self, exchange: Exchange, scope: Scope, receive: Receive, send: Send, headers: Headers
    ) -> None:
        """Have the request answered, by the cache or by an engine; `headers` go with the reply."""
        source: Exchange | Reader | Replay = exchange
        leave: Callable[[], None] = functools.partial(self.driver.cancel, exchange)
        if self.cache.enabled:
            verdict, cached = await self.cache.open(exchange, scope["headers"])
            headers = [*headers, (b"x-headway-cache", verdict.encode())]
            if cached is not None:
                source, leave = cached, cached.leave
        if source is exchange:
            self.driver.open(exchange)
        leaving = asyncio.ensure_future(_leave_with_client(receive, leave))
        try:
            await self._relay(source, send, headers)
        finally:
            leaving.cancel()
            leave()

    def _admit(self, scope: Scope, body: bytes, caller: Caller | None) -> tuple[Exchange, int]:
        forwarded: Headers = []
        request_id = ""
        priority_class = self.config.router.default_class
        if caller is not None:
            priority_class = caller.tenant.default_class(priority_class)
        for name, value in scope["headers"]:
            if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
                request_id = value.decode()
            elif name == b"x-headway-class":
                priority_class = _class(value)
            elif _FORWARDED.fullmatch(name):
                forwarded.append((name, value))
        if not request_id or request_id in self.driver.exchanges:
            request_id = uuid.uuid4().hex
        # The body is JSON, whatever the client called it (curl -d calls it a form).
        forwarded.append((b"content-type", b"application/json"))
        forwarded.append((b"x-request-id", request_id.encode()))
        path = scope["path"]
        request, num_text_bytes = self.intake.parse(
            path,
            body,
            request_id,
            self.driver.engines,
            time.monotonic(),
            self.config.router.max_hold_s,
            priority_class=priority_class,
            wants_prefix=self.router.wants_prefix,
            models_elsewhere=self.providers.models,
        )
        if caller is not None:
            caller.tenant.check(request)
            request = msgspec.structs.replace(
                request, tenant=caller.tenant.name, weight=caller.tenant.config.weight
            )
        return Exchange(request, "POST", path, forwarded, body), num_text_bytes

    async def _relay(
        self, source: Exchange | Reader | Replay, send: Send, headers: Headers
    ) -> None:
        """Pass the response on as it comes; raises `ApiError` while it can still be one."""
        started = False
        try:
            while True:
                chunk = await source.next_chunk()
                if not started:
                    started = True
                    await send(_start(source.status, [*source.response_headers, *headers]))
                await send({"type": "http.response.body", "body": chunk, "more_body": bool(chunk)})
                if not chunk:
                    return
                if isinstance(source, Exchange):
                    self.driver.taken(source, len(chunk))
        except Rejected as rejected:
            raise from_rejection(rejected.reason, rejected.retry_after_s) from None
        except EngineFailed as failed:
            error = ApiError(502, f"The engine failed: {failed}", kind="InternalServerError")
            if not started:
                raise error from None
            # An SSE client reads this as an error; without [DONE] the reply is
            # visibly incomplete. Other clients see the connection break.
            event = b"data: " + error.body() + b"\n\n"
            with contextlib.suppress(RuntimeError):
                await send({"type": "http.response.body", "body": event, "more_body": False})


class _Endpoint:
    """Starlette runs a class instance as a bare ASGI application."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._gateway.serve(scope, receive, send)


async def _leave_with_client(receive: Receive, leave: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    leave()


def _class(value: bytes) -> RequestClass:
    try:
        return RequestClass(value.decode("latin-1"))
    except ValueError:
        raise ApiError(
            400,
            "x-headway-class: one of " + ", ".join(known.value for known in RequestClass),
            param="x-headway-class",
        ) from None


def _settlement(exchange: Exchange) -> Usage | None:
    """What the request took, as far as that is known; nothing if no engine ran it."""
    if exchange.usage is None and (exchange.num_attempts == 0 or exchange.status >= 400):
        return Usage()
    return exchange.usage


def _start(status: int, headers: Headers) -> Message:
    return {"type": "http.response.start", "status": status, "headers": headers}


async def _send_error(send: Send, error: ApiError) -> None:
    body = error.body()
    headers = [*error.headers(), (b"content-length", b"%d" % len(body))]
    if error.status == 413:
        headers.append((b"connection", b"close"))
    await send(_start(error.status, headers))
    await send({"type": "http.response.body", "body": body})


async def _reply_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return Response(
        error.body(), error.status, {name.decode(): v.decode() for name, v in error.headers()}
    )


async def _no_such_route(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    return await _reply_error(
        request,
        ApiError(
            status,
            f"{request.method} {request.url.path} is not served here.",
            kind="NotFoundError" if status == 404 else "BadRequestError",
        ),
    )
