"""What does a gateway consist of, and what do its small endpoints answer?"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from router import Router
from serving.config import Config, read
from serving.core_form import form
from serving.file_watch import FileWatch, FileWatchState
from serving.gateway.cache.response_cache import ResponseCache
from serving.gateway.driver import Driver
from serving.gateway.http.body_reader import BodyReader
from serving.gateway.http.connections import Connections, make_connections
from serving.gateway.http.endpoint import is_loopback
from serving.gateway.http.endpoints.adapters import LoraAdapters
from serving.gateway.http.endpoints.admin import AdminEndpoints
from serving.gateway.http.endpoints.answers import EngineEndpoints
from serving.gateway.http.endpoints.batch.batches import Batches
from serving.gateway.http.endpoints.batch.endpoints import BatchEndpoints
from serving.gateway.http.endpoints.batch.objects import BatchesState
from serving.gateway.http.endpoints.health import make_health
from serving.gateway.http.endpoints.kept import KeptResponses
from serving.gateway.http.endpoints.model_cards import make_cards, make_route_cards
from serving.gateway.http.endpoints.table import COMPUTED, is_for_anybody
from serving.gateway.http.errors import model_not_found
from serving.gateway.http.front import Front
from serving.gateway.intake.length.memory import LengthMemory
from serving.gateway.intake.length.weights import shipped_lengths
from serving.gateway.intake.request_parser import RequestParser
from serving.gateway.intake.routes import Routes
from serving.gateway.intake.served_models import ModelEntry, ServedModels
from serving.gateway.observe.metrics.engines import CONTENT_TYPE, engine_metrics
from serving.gateway.observe.metrics.requests import Metrics
from serving.gateway.observe.observer import Observer
from serving.gateway.observe.page.assets import Assets
from serving.gateway.observe.page.feed import Feed
from serving.gateway.observe.peers.orders import OrderBook
from serving.gateway.observe.peers.together import Together
from serving.gateway.observe.state import GatewayState, ScalerState
from serving.gateway.providers.calls import Providers
from serving.gateway.providers.leases import Leases, SendUpdate
from serving.gateway.request_path import RequestPath
from serving.gateway.tenants.keys import read_keys
from serving.gateway.tenants.tenants import Tenants

logger = logging.getLogger(__name__)

_MAX_OWN_CONNECTIONS = 64


class Gateway:
    """One gateway: the ASGI application and all that it uses, on one event loop.

    Create it on the running loop. It raises `ConfigError` if a key cannot be read.
    """

    def __init__(
        self,
        config: Config,
        gateway_id: str,
        send_update: SendUpdate | None = None,
        *,
        served_names: Sequence[str] = (),
        rank: int = 0,
        local_rank: int | None = None,
    ) -> None:
        """`send_update` reaches the keeper of leases where several gateways share limits.

        `served_names` are those that engines will serve; empty if only they know. `rank` counts
        the application's gateways from 0, `local_rank` those of this node.
        """
        self.config = config
        self.gateway_id = gateway_id
        self.rank = rank
        self.local_rank = rank if local_rank is None else local_rank
        self.metrics = Metrics(rank)
        self.observer = Observer(config, gateway_id, rank, self.metrics)
        self.router = Router(config.router)
        lengths = shipped_lengths()
        self.router.use_lengths(lengths)
        self._length_memory = LengthMemory(lengths, config.gateway.lengths_file, rank)
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
        self._use_external(config)
        self.served_models = ServedModels(served_names, self.driver.engines.infos)
        self.routes = Routes(
            config.routes,
            self.router.chooser,
            self.served_models,
            tells_client=config.gateway.reply_headers,
        )
        self.request_parser = RequestParser(config, self.served_models, self.routes)
        self.body_reader = BodyReader(config.gateway)
        self.cache = ResponseCache(config, self.driver)
        self.tenants = self._make_tenants()
        self.file_watches = self._watch_files()
        kept = KeptResponses(self.driver.engines)
        self.request_path = RequestPath(
            config,
            self.driver,
            self.body_reader,
            self.request_parser,
            self.providers,
            self.tenants,
            self.cache,
            self.observer,
            kept,
            self.served_models,
        )
        self.batches: Batches | None = None
        if config.batch.dir is not None:
            self.batches = Batches(config, gateway_id, self.request_path, served_names)
        self.background: list[asyncio.Task[None]] = []  # that end with the gateway
        self.scalers: dict[str, ScalerState] = {}  # by model, told by whoever scales
        self.started_s = int(time.time())  # seconds since the epoch
        self.metrics.export_state(self.state)
        self.together = self._make_together()
        adapters = LoraAdapters(self.driver.engines, self.together, self.routes.find_owner)
        self._engine_endpoints = EngineEndpoints(
            self.driver.engines, self.tenants, self.body_reader, kept, adapters
        )
        self._feeds: list[Feed] = []
        self._assets = Assets()
        self.connections = make_connections(config)
        self.app = self._make_front()
        # For those who ask each gateway for itself: what answers on `metrics_port`.
        own_connections = Connections(_MAX_OWN_CONNECTIONS, max_per_client=None)
        self.own_app = Front(config, self._own_routes(alone=True), own_connections, {})

    def _make_together(self) -> Together:
        router = self.config.router
        orders = OrderBook(
            self.gateway_id,
            (router.policy, router.ablate),
            self.driver.set_policy,
            lambda engine, drains: self.driver.engines.drain(engine, drains=drains),
        )
        return Together(
            self.gateway_id,
            self.rank,
            self.config.gateway.num_replicas,
            state=self.state,
            recent=self.driver.recent,
            tenants=self.tenants,
            reload=self._reload_files,
            orders=orders,
        )

    def _make_feed(self, *, alone: bool) -> Feed:
        """Return a feed of frames, which ends with the others."""
        together = self.together
        feed = Feed(
            lambda request: self.tenants.authorize_admin(request.headers.raw),
            together.own_parts if alone else together.parts,
            1 if alone else together.num_gateways,
        )
        self._feeds.append(feed)
        return feed

    def close_feeds(self) -> None:
        """End what would go on for as long as somebody looks at the page."""
        for feed in self._feeds:
            feed.close()

    async def _reload_files(self) -> dict[str, FileWatchState]:
        for watch in self.file_watches.values():
            await watch.reload()
        return {name: watch.state() for name, watch in self.file_watches.items()}

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
        self._use_external(config)
        self.tenants.use_configs(config.tenants)
        self.routes.use_configs(config.routes)

    def _use_external(self, config: Config) -> None:
        """Have these servers that run already among the engines. Raise `ConfigError` for a key."""
        window_bytes = self.config.gateway.stream_window_bytes
        self.driver.engines.use_external(config.external, window_bytes)

    def use_models(self, entries: Sequence[ModelEntry]) -> None:
        """Go by these models of the configuration from now on.

        What was asked of others before may be answered; who asks for them now is told that there
        are none.
        """
        self.served_models.use_entries(entries)
        self.router.expect_models([name for entry in entries for name in entry.names])
        self.driver.engines.remove_models(self.served_models.removed)

    def use_failures(self, failed: Mapping[str, str]) -> None:
        """Refuse what asks, or waits, for models whose deployments could not start, saying why."""
        for name, why in self.served_models.use_failures(failed).items():
            self.driver.on_model_gone((name,), f"could not be started: {why}")

    def _on_grant(self) -> None:
        """Let the router decide again: requests may wait for what was just leased."""
        self.driver.execute(self.router.on_tick(time.monotonic()))

    def close(self) -> None:
        """Stop watching files and close the connections to engines and other gateways."""
        for task in self.background:
            task.cancel()
        for watch in self.file_watches.values():
            watch.close()
        if self.together.peers is not None:
            self.together.peers.close()
        if self.batches is not None:
            self.batches.close()
        self.cache.close()
        self.driver.close()
        self.observer.close()
        self._length_memory.close()

    def _make_front(self) -> Front:
        routes = [
            *(Route(path, self.request_path, methods=["POST"]) for path in COMPUTED),
            Route("/v1/models", self.get_models),
            Route("/v1/models/{name:path}", self.get_model),
            Route("/ping", self.get_health, methods=["GET", "POST"]),
            Route("/load", self.get_load),
            *self._engine_endpoints.routes(),
            *BatchEndpoints(self.config, self.tenants, self.batches).routes(),
            *self._own_routes(alone=False),
        ]
        models = dict.fromkeys(COMPUTED, self.request_path)
        behind_serve = self.config.gateway.front == "haproxy"
        return Front(
            self.config,
            routes,
            self.connections,
            models,
            behind_serve=behind_serve,
            is_for_anybody=is_for_anybody,
        )

    @property
    def metrics_port(self) -> int:
        """The port on which this gateway answers for itself; 0: none."""
        base = self.config.gateway.metrics_port
        return base + self.local_rank if base else 0

    def _own_routes(self, *, alone: bool) -> list[Route]:
        """What tells of this gateway, and of the others unless it is asked `alone`."""
        admin = AdminEndpoints(self.tenants, self.together, self.driver.engines, alone=alone)
        feed = self._make_feed(alone=alone)
        return [
            Route("/health", self.get_health),
            Route("/health/ready", self.get_health),
            Route("/-/healthz", self.get_health),  # where Ray Serve's proxy answers: KubeRay asks
            Route("/health/live", self.get_liveness),
            Route("/metrics", self.get_metrics),
            Route("/metrics/engines", self.get_engine_metrics),
            *admin.routes(),
            *feed.routes(),
            *self._assets.routes(),
        ]

    # --- the small endpoints ----------------------------------------------

    def state(self) -> GatewayState:
        """Return every engine's snapshot and ledger, the hold queue, the outcomes and more."""
        now_s = time.monotonic()
        return GatewayState(
            gateway_id=self.gateway_id,
            rank=self.rank,
            core=form(),
            metrics_port=self.metrics_port,
            num_connections=len(self.connections),
            num_open_requests=len(self.driver.exchanges),
            num_record_bytes=self.driver.records.num_bytes,
            num_incoming_bytes=self.body_reader.num_bytes,
            tokens_per_byte=self.request_parser.tokens_per_byte.ratio,
            num_chosen={name: dict(each) for name, each in self.routes.num_chosen.items()},
            tenants=self.tenants.state(now_s),
            cache=self.cache.state(),
            batches=self.batches.state() if self.batches is not None else BatchesState(),
            hardware=dict(self.driver.engines.hardware),
            files={name: watch.state() for name, watch in self.file_watches.items()},
            drained=sorted(self.driver.engines.drained),
            scalers=dict(self.scalers),
            **msgspec.structs.asdict(self.router.state(now_s)),
        )

    async def get_models(self, request: Request) -> Response:
        """Answer with the models that the caller may use, as vLLM lists them."""
        cards = self._cards_for(request)
        return _json({"object": "list", "data": list(cards.values())})

    async def get_model(self, request: Request) -> Response:
        """Answer with one model that the caller may use."""
        name = request.path_params["name"]
        card = self._cards_for(request).get(name)
        if card is None:
            raise model_not_found(name)
        return _json(card)

    def _cards_for(self, request: Request) -> dict[str, dict[str, Any]]:
        caller = self.tenants.authenticate(request.headers.raw)
        models = self.served_models
        cards = make_cards(models.listed, self.providers.models, self.started_s, models.configured)
        if caller is not None:
            cards = {name: card for name, card in cards.items() if caller.tenant.may_use((name,))}
        return cards | make_route_cards(self.routes.configs, cards, self.started_s)

    async def get_liveness(self, request: Request) -> Response:
        """Answer 200: this gateway's event loop runs."""
        return _json({"status": "ok"})

    async def get_health(self, request: Request) -> Response:
        """Answer 200 while an engine takes requests or a provider stands in, else 503.

        It needs no key. Names of models are for those whose keys may use them, where there are
        keys.
        """
        health = make_health(
            self.router.state(time.monotonic()),
            self.providers.models,
            starts_engines=bool(self.served_models.scaled),
            without_engine=self.served_models.without_engine(),
        )
        content = msgspec.to_builtins(health)
        models = content.pop("models")
        usable = self.tenants.usable_models(request.headers.raw, models)
        if usable is not None:
            content["models"] = {name: models[name] for name in usable}
        return _json(content, 200 if health.is_ready else 503)

    async def get_load(self, request: Request) -> Response:
        """Answer with how many requests this gateway has open, in vLLM's words."""
        self.tenants.authenticate(request.headers.raw)
        return _json({"server_load": len(self.driver.exchanges)})

    async def get_metrics(self, request: Request) -> Response:
        """Answer with the metrics in Prometheus's text format."""
        if not self.config.auth.open_metrics:
            self.tenants.authorize_admin(request.headers.raw)
        text, content_type = self.metrics.render(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    async def get_engine_metrics(self, request: Request) -> Response:
        """Answer with all engines' own metrics in Prometheus's text format."""
        if not self.config.auth.open_metrics:
            self.tenants.authorize_admin(request.headers.raw)
        text = await engine_metrics(self.driver.engines)
        return Response(text, headers={"content-type": CONTENT_TYPE})


def _json(content: Any, status: int = 200) -> Response:
    """Return a response with `content`, which may contain structs, as JSON."""
    return Response(msgspec.json.encode(content), status, media_type="application/json")
