"""The OpenAI-compatible front: all that stands behind it, and its small endpoints."""

import logging
import time
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.routing import Route

from router.core.router import Router
from serving.config import Config, read
from serving.file_watch import FileWatch
from serving.gateway.cache.response_cache import ResponseCache
from serving.gateway.driver import Driver
from serving.gateway.http.body_reader import Bodies
from serving.gateway.http.endpoint import is_loopback
from serving.gateway.http.errors import ApiError
from serving.gateway.metrics import GatewayState, Metrics
from serving.gateway.providers.calls import Providers
from serving.gateway.providers.leases import Ask, Leases
from serving.gateway.request_parser import ENDPOINTS, Intake
from serving.gateway.request_path import TokenPath
from serving.gateway.tenants.keys import read_keys
from serving.gateway.tenants.tenants import Tenants
from serving.renamed import current_parts

logger = logging.getLogger(__name__)


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
        self.token_path = TokenPath(
            config,
            self.driver,
            self.bodies,
            self.intake,
            self.providers,
            self.tenants,
            self.cache,
        )
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
            app.router.routes.append(Route(path, self.token_path, methods=["POST"]))
        app.get("/v1/models")(self.models)
        app.get("/health")(self.health)
        app.get("/metrics")(self.prometheus)
        app.get("/headway/state")(self.get_state)
        app.get("/headway/state/schema")(self.get_state_schema)
        app.post("/headway/policy")(self.set_policy)
        app.post("/headway/reload")(self.reload)
        app.get("/headway/usage")(self.get_usage)
        app.add_exception_handler(ApiError, _reply_error)
        app.add_exception_handler(404, _no_such_route)
        app.add_exception_handler(405, _no_such_route)
        return app

    # --- the small endpoints ----------------------------------------------

    def state(self) -> GatewayState:
        """Return every engine's snapshot and ledger, the hold queue, the outcomes and more."""
        now_s = time.monotonic()
        return GatewayState(
            gateway_id=self.gateway_id,
            num_open_requests=len(self.driver.exchanges),
            num_record_bytes=self.driver.records.num_bytes,
            num_incoming_bytes=self.bodies.num_bytes,
            tokens_per_byte=self.intake.tokens_per_byte,
            tenants=self.tenants.state(now_s),
            cache=self.cache.state(),
            files={name: watch.state() for name, watch in self.watches.items()},
            **msgspec.structs.asdict(self.router.state(now_s)),
        )

    async def get_state(self, request: Request) -> Response:
        """Answer with this gateway's state."""
        self.tenants.authorize_admin(request.headers.raw)
        return _json(self.state())

    async def get_state_schema(self, request: Request) -> Response:
        """Answer with the JSON schema of `/headway/state`."""
        self.tenants.authorize_admin(request.headers.raw)
        return _json(msgspec.json.schema(GatewayState))

    async def get_usage(self, request: Request) -> Response:
        """What each tenant has used of this gateway; one without an admin key sees its own."""
        caller = self.tenants.authenticate(request.headers.raw)
        usage = self.tenants.usage()
        if caller is not None and not caller.is_admin:
            usage = {caller.tenant.name: usage[caller.tenant.name]}
        return _json({"gateway_id": self.gateway_id, "tenants": usage})

    async def reload(self, request: Request) -> Response:
        """Read keys and config anew now; without this, within a second of a change."""
        self.tenants.authorize_admin(request.headers.raw)
        for watch in self.watches.values():
            await watch.reload()
        return _json({name: watch.state() for name, watch in self.watches.items()})

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
            name, parts = body["policy"], current_parts(body.get("ablate", []))
            self.driver.set_policy(name, parts)
        except (ValueError, KeyError, TypeError) as error:
            raise ApiError(400, f"'policy': {error}", param="policy") from None
        return JSONResponse({"policy": name, "ablate": parts})


def _json(content: Any) -> Response:
    """Answer with this, structs in it or not, as JSON."""
    return Response(msgspec.json.encode(content), media_type="application/json")


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
