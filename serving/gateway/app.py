"""What does a gateway consist of, and what do its small endpoints answer?"""

import logging
import time
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.routing import Route

from router import Router
from serving.config import Config, read
from serving.file_watch import FileWatch
from serving.gateway.cache.response_cache import ResponseCache
from serving.gateway.driver import Driver
from serving.gateway.http.body_reader import BodyReader
from serving.gateway.http.endpoint import is_loopback
from serving.gateway.http.errors import ApiError
from serving.gateway.metrics import GatewayState, Metrics
from serving.gateway.providers.calls import Providers
from serving.gateway.providers.leases import Leases, SendUpdate
from serving.gateway.request_parser import ENDPOINTS, RequestParser
from serving.gateway.request_path import RequestPath
from serving.gateway.tenants.keys import read_keys
from serving.gateway.tenants.tenants import Tenants
from serving.renamed import current_parts

logger = logging.getLogger(__name__)


class Gateway:
    """One gateway: the ASGI application and all that it uses, on one event loop.

    Create it on the running loop. It raises `ConfigError` if a key cannot be read.
    """

    def __init__(
        self, config: Config, gateway_id: str, send_update: SendUpdate | None = None
    ) -> None:
        """`send_update` reaches the keeper of leases where several gateways share limits."""
        self.config = config
        self.gateway_id = gateway_id
        self.metrics = Metrics()
        self.router = Router(config.router)
        leases = None
        if send_update is not None:
            leases = Leases(gateway_id, send_update, self._on_grant)
        self.providers = Providers(config.gateway.stream_window_bytes, leases)
        self.driver = Driver(
            self.router,
            self.providers,
            self.metrics,
            window_bytes=config.gateway.stream_window_bytes,
            max_record_bytes=config.gateway.max_record_bytes,
        )
        self.driver.use_providers(config)
        self.request_parser = RequestParser()
        self.body_reader = BodyReader(config.gateway)
        self.cache = ResponseCache(config, self.driver)
        self.tenants = self._make_tenants()
        self.file_watches = self._watch_files()
        self.request_path = RequestPath(
            config,
            self.driver,
            self.body_reader,
            self.request_parser,
            self.providers,
            self.tenants,
            self.cache,
        )
        self.started_s = int(time.time())  # seconds since the epoch
        self.metrics.export_state(self.state)
        self.app = self._make_app()

    def _make_tenants(self) -> Tenants:
        config = self.config
        if (keys_file := config.auth.keys_file) is not None:
            return Tenants(config, read_keys(keys_file))
        if config.gateway.front == "own" and not is_loopback(config.gateway.host):
            logger.warning(
                "open to the network on %s, and nobody needs a key: set auth.keys_file",
                config.gateway.host,
            )
        return Tenants(config, None)

    def _watch_files(self) -> dict[str, FileWatch]:
        """Start to watch the files that may change. Return the watches by setting."""
        watches: dict[str, FileWatch] = {}
        if (keys_file := self.config.auth.keys_file) is not None:
            watches["auth.keys_file"] = FileWatch(keys_file, read_keys, self.tenants.use_keys)
        if (watch_file := self.config.watch_file) is not None:
            watches["watch_file"] = FileWatch(watch_file, read, self._use_config)
        return watches

    def _use_config(self, config: Config) -> None:
        """Use those sections of a changed config file that may change while serving.

        Raise `ConfigError` if a provider's key cannot be read or Redis cannot be used.
        """
        self.cache.use_config(config.cache)
        self.driver.use_providers(config)
        self.tenants.use_configs(config.tenants)

    def _on_grant(self) -> None:
        """Let the router decide again: requests may wait for what was just leased."""
        self.driver.execute(self.router.on_tick(time.monotonic()))

    def close(self) -> None:
        """Stop watching files and close the connections to engines."""
        for watch in self.file_watches.values():
            watch.close()
        self.cache.close()
        self.driver.close()

    def _make_app(self) -> FastAPI:
        app = FastAPI(title="Headway", openapi_url=None)
        for path in ENDPOINTS:
            # A plain ASGI endpoint: tokens pass through no response object.
            app.router.routes.append(Route(path, self.request_path, methods=["POST"]))
        app.get("/v1/models")(self.get_models)
        app.get("/health")(self.get_health)
        app.get("/metrics")(self.get_metrics)
        app.get("/headway/state")(self.get_state)
        app.get("/headway/state/schema")(self.get_state_schema)
        app.post("/headway/policy")(self.set_policy)
        app.post("/headway/reload")(self.reload_files)
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
            num_incoming_bytes=self.body_reader.num_bytes,
            tokens_per_byte=self.request_parser.tokens_per_byte,
            tenants=self.tenants.state(now_s),
            cache=self.cache.state(),
            files={name: watch.state() for name, watch in self.file_watches.items()},
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
        """Answer with what each tenant has used; with the caller's own unless it is an admin."""
        caller = self.tenants.authenticate(request.headers.raw)
        usage = self.tenants.usage()
        if caller is not None and not caller.is_admin:
            usage = {caller.tenant.name: usage[caller.tenant.name]}
        return _json({"gateway_id": self.gateway_id, "tenants": usage})

    async def reload_files(self, request: Request) -> Response:
        """Read keys and config again now; otherwise this happens within a second of a change."""
        self.tenants.authorize_admin(request.headers.raw)
        for watch in self.file_watches.values():
            await watch.reload()
        return _json({name: watch.state() for name, watch in self.file_watches.items()})

    async def get_models(self, request: Request) -> JSONResponse:
        """Answer with the models that the caller may use, as OpenAI's API lists them."""
        caller = self.tenants.authenticate(request.headers.raw)
        cards = {
            name: info
            for info in self.driver.engines.infos.values()
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

    async def get_health(self) -> JSONResponse:
        """Answer 200 while an engine is connected or a provider is configured, else 503."""
        num_engines = len(self.driver.engines.infos)
        without_engines = "providers only" if self.providers.models else "no engine"
        return JSONResponse(
            {"status": "ok" if num_engines else without_engines, "num_engines": num_engines},
            status_code=200 if num_engines or self.providers.models else 503,
        )

    async def get_metrics(self, request: Request) -> Response:
        """Answer with the metrics in Prometheus's text format."""
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
    """Return a response with `content`, which may contain structs, as JSON."""
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
