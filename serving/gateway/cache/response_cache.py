"""Can a request be answered by a response that is stored, or on its way to another client?

look_up:  bypass  not deterministic, or the client forbids storing
          hit     stored: replayed
          join    another client's generation of it is running: read along
          miss    its generation starts, and is stored when it has ended well
"""

import asyncio
import hashlib
import time
from collections.abc import Callable, Coroutine
from typing import Literal

import msgspec

from router import RequestClass
from serving.config import CacheConfig, Config
from serving.gateway.cache.cache_key import cache_key
from serving.gateway.cache.response_store import (
    MemoryStore,
    RedisStore,
    ResponseCacheState,
    ResponseStore,
    StoredResponse,
)
from serving.gateway.cache.single_flight import SingleFlight, Subscriber
from serving.gateway.driver import Driver
from serving.gateway.exchange import Exchange, tell_nobody
from serving.stream.frames import Headers

Verdict = Literal["hit", "miss", "join", "bypass"]
# By class, too: an urgent request does not wait for a batch request's place in the queue.
SingleFlightKey = tuple[str, RequestClass]

# Belong to one reply, not to its content.
_OWN_HEADERS = (b"date", b"x-request-id")
# Marks what a provider answered instead of the engines: another model, perhaps, so the next
# such request is to get the engines' answer.
_PROVIDER_HEADER = b"x-headway-provider"
# Of the bound, for responses that are being generated; stored ones are evicted for them.
_FLIGHT_SHARE = 0.5


class Replay:
    """A stored response, whole in one chunk; read like an `Exchange`."""

    def __init__(self, stored: StoredResponse) -> None:
        self.status = stored.status
        self.on_readable: Callable[[], None] = tell_nobody  # never called: all is there
        age_s = max(0, int(time.time() - stored.created_s))
        self.response_headers: Headers = [*stored.headers, (b"age", b"%d" % age_s)]
        self._body = stored.body

    def read(self) -> bytes:
        """Return the body, then b""."""
        body, self._body = self._body, b""
        return body

    @property
    def is_at_end(self) -> bool:
        """Whether all of it has been read."""
        return not self._body

    def close(self) -> None:
        """Do nothing: there is nothing to end."""


class ResponseCache:
    """Responses by exact request: of the same tenant, to the same model.

    Stands between the request path and the driver: hits and joins never reach the router.
    """

    def __init__(self, config: Config, driver: Driver) -> None:
        """Raises `ConfigError` if Redis is asked for and its client library is not there."""
        self.num_by_verdict: dict[Verdict, int] = {"hit": 0, "miss": 0, "join": 0, "bypass": 0}
        self._driver = driver
        self._model_revision = hashlib.sha256(
            msgspec.json.encode(
                [config.model, config.engine.args], order="deterministic", enc_hook=str
            )
        ).hexdigest()
        self._flights: dict[SingleFlightKey, SingleFlight] = {}
        self._num_flight_bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._config = config.cache
        self._store = _make_store(config.cache)

    @property
    def enabled(self) -> bool:
        """Whether responses are looked up and kept at all."""
        return self._config.enabled

    def use_config(self, config: CacheConfig) -> None:
        """Go by these settings from now on. Raises `ConfigError`, and then changes nothing.

        What is stored stays, within the new bound, unless the cache is switched off or the
        store changes.
        """
        stays = config.enabled and config.redis_url == self._config.redis_url
        if stays and self._config.enabled:
            if isinstance(self._store, MemoryStore):
                self._store.shrink_to(config.max_bytes)
        else:
            store = _make_store(config)
            self._spawn(self._store.close())
            self._store = store
        self._config = config

    async def look_up(
        self, exchange: Exchange, headers: Headers
    ) -> tuple[Verdict, Subscriber | Replay | None]:
        """Return how the request is answered, and what to read.

        With a bypass that is None: then the caller opens the exchange itself.
        """
        no_store, no_cache = _cache_control(headers)
        key = None if no_store else self._cache_key(exchange)
        if key is None:
            return self._count_verdict("bypass"), None
        flight_key = (key, exchange.request.priority_class)
        if not no_cache:
            if (subscriber := self._subscribe(flight_key)) is not None:
                return self._count_verdict("join"), subscriber
            stored = await self._store.get(key)
            if stored is not None:
                return self._count_verdict("hit"), Replay(stored)
            # While Redis was asked another request may have started it.
            if (subscriber := self._subscribe(flight_key)) is not None:
                return self._count_verdict("join"), subscriber
        flight = SingleFlight(
            exchange,
            self._driver,
            keep=self._keep_bytes,
            release=self._release_bytes,
            on_end=lambda flight: self._finish_flight(flight_key, flight),
        )
        self._flights[flight_key] = flight
        return self._count_verdict("miss"), flight.subscribe()

    def state(self) -> ResponseCacheState:
        """Return the counts so far, and what is kept now."""
        store = self._store
        state = ResponseCacheState(
            enabled=self.enabled,
            num_hit=self.num_by_verdict["hit"],
            num_miss=self.num_by_verdict["miss"],
            num_join=self.num_by_verdict["join"],
            num_bypass=self.num_by_verdict["bypass"],
            num_flights=len(self._flights),
            num_flight_bytes=self._num_flight_bytes,
            num_store_errors=store.num_errors,
        )
        if not isinstance(store, MemoryStore):
            return state
        return msgspec.structs.replace(
            state,
            num_stored=len(store),
            num_stored_bytes=store.num_bytes,
            num_evicted=store.num_evicted,
        )

    def close(self) -> None:
        """Close the store; what it keeps in memory is lost."""
        self._spawn(self._store.close())

    def _count_verdict(self, verdict: Verdict) -> Verdict:
        self.num_by_verdict[verdict] += 1
        return verdict

    def _cache_key(self, exchange: Exchange) -> str | None:
        """Return the key of a request; None if it is not deterministic."""
        request = exchange.request
        for info in self._driver.engines.infos.values():
            if request.model in (info.model, *info.aliases):
                break
        else:
            return None  # it is not known yet which engine would answer
        adapter_path = info.adapters.get(request.model, "")
        scope = (
            request.tenant,
            self._config.revision,
            self._model_revision,
            info.engine,
            adapter_path,
        )
        return cache_key(
            exchange.path,
            exchange.body,
            exchange.fields,
            request.model,
            scope,
            with_tools=self._config.tools,
        )

    def _subscribe(self, flight_key: SingleFlightKey) -> Subscriber | None:
        """Join a running generation; None if there is none that can be joined."""
        flight = self._flights.get(flight_key)
        return flight.subscribe() if flight is not None and flight.is_whole else None

    def _keep_bytes(self, flight: SingleFlight, num_bytes: int) -> bool:
        """Keep so many bytes more of a running generation. Return False if they are too many."""
        config = self._config
        if (
            flight.num_kept_bytes + num_bytes > config.max_entry_bytes
            or self._num_flight_bytes + num_bytes > _FLIGHT_SHARE * config.max_bytes
        ):
            return False
        self._num_flight_bytes += num_bytes
        self._make_room()
        return True

    def _release_bytes(self, num_bytes: int) -> None:
        self._num_flight_bytes -= num_bytes
        self._make_room()

    def _make_room(self) -> None:
        """Leave the store what running generations do not take of the bound."""
        if isinstance(self._store, MemoryStore):
            self._store.shrink_to(self._config.max_bytes - self._num_flight_bytes)

    def _finish_flight(self, flight_key: SingleFlightKey, flight: SingleFlight) -> None:
        """Store what a generation gave, if it is worth it: it has ended, or all have left."""
        body = flight.body
        exchange = flight.exchange
        if body is None or not _is_worth_keeping(exchange, body):
            self._forget_flight(flight_key, flight)
            return
        headers = [
            (name, value)
            for name, value in exchange.response_headers
            if name.lower() not in _OWN_HEADERS
        ]
        stored = StoredResponse(exchange.status, headers, body, time.time())
        if stored.num_bytes > self._config.max_entry_bytes:
            self._forget_flight(flight_key, flight)
        else:
            self._spawn(self._store_response(flight_key, flight, stored))

    async def _store_response(
        self, flight_key: SingleFlightKey, flight: SingleFlight, stored: StoredResponse
    ) -> None:
        # Until it is stored new requests join the flight, or it would run twice.
        try:
            await self._store.put(flight_key[0], stored, self._config.ttl_s)
        finally:
            self._forget_flight(flight_key, flight)

    def _forget_flight(self, flight_key: SingleFlightKey, flight: SingleFlight) -> None:
        if self._flights.get(flight_key) is flight:
            del self._flights[flight_key]

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _make_store(config: CacheConfig) -> ResponseStore:
    if config.enabled and config.redis_url is not None:
        return RedisStore(config.redis_url.get_secret_value())
    return MemoryStore(config.max_bytes)


def _cache_control(headers: Headers) -> tuple[bool, bool]:
    """Whether the client forbids storing, and asks for a fresh answer (RFC 9111)."""
    for name, value in headers:
        if name == b"cache-control":
            directives = {directive.strip() for directive in value.lower().split(b",")}
            return b"no-store" in directives, b"no-cache" in directives
    return False, False


def _is_worth_keeping(exchange: Exchange, body: bytes) -> bool:
    """Whether a whole body is an answer: streams tell of errors under status 200."""
    headers = dict(exchange.response_headers)
    if exchange.status != 200 or _PROVIDER_HEADER in headers:
        return False
    if not headers.get(b"content-type", b"").startswith(b"text/event-stream"):
        return True
    if b'data: {"error"' in body:
        return False
    if exchange.path == "/v1/responses":
        return b"event: response.completed" in body
    return body.rstrip().endswith(b"data: [DONE]")
