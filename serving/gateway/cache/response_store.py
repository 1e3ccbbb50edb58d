"""Where are complete responses kept: in memory, or in Redis?"""

import logging
import time
from collections import OrderedDict
from typing import Protocol

import msgspec

from serving.config import ConfigError
from serving.stream.frames import Headers

logger = logging.getLogger(__name__)

# Beside the bytes themselves: objects, key and place in the table, measured at about 1 KB.
_ENTRY_BYTES = 1024
# A cache that takes longer than this to answer is of no use; then it is not asked for a while.
_REDIS_TIMEOUT_S = 0.25
_REDIS_PAUSE_S = 5.0
# A Redis answers in parts of a millisecond: more at once would only fill its buffers.
_REDIS_CONNECTIONS = 16
_REDIS_PREFIX = "headway:response:"


class StoredResponse(msgspec.Struct, frozen=True, array_like=True):
    """A response as it was sent."""

    status: int
    headers: Headers
    body: bytes
    created_s: float  # seconds since the epoch

    @property
    def num_bytes(self) -> int:
        """About how much memory it takes."""
        num_header_bytes = sum(len(name) + len(value) for name, value in self.headers)
        return _ENTRY_BYTES + num_header_bytes + len(self.body)


class ResponseCacheState(msgspec.Struct, frozen=True, kw_only=True):
    """How requests were answered, and what is kept; `num_stored…` are absent with Redis."""

    enabled: bool
    num_hit: int
    num_miss: int
    num_join: int
    num_bypass: int
    num_flights: int  # responses on their way
    num_flight_bytes: int
    num_store_errors: int
    num_stored: int | msgspec.UnsetType = msgspec.UNSET
    num_stored_bytes: int | msgspec.UnsetType = msgspec.UNSET
    num_evicted: int | msgspec.UnsetType = msgspec.UNSET


class ResponseStore(Protocol):
    """Keeps responses for a time."""

    num_errors: int

    async def get(self, key: str) -> StoredResponse | None:
        """Return the response, None if there is none, or none that can be had now."""
        ...

    async def put(self, key: str, response: StoredResponse, ttl_s: float) -> None:
        """Keep a response for so long, if there is room."""
        ...

    async def close(self) -> None:
        """Let go of what the store holds."""
        ...


class MemoryStore:
    """Responses in this process; the least recently used are evicted when bytes run out."""

    def __init__(self, max_bytes: int) -> None:
        self.num_bytes = 0
        self.num_evicted = 0
        self.num_errors = 0
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, tuple[StoredResponse, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    async def get(self, key: str) -> StoredResponse | None:
        """Return the response, None if there is none or it has expired."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        response, expires_s = entry
        if expires_s <= time.time():
            self._remove(key)
            return None
        self._entries.move_to_end(key)
        return response

    async def put(self, key: str, response: StoredResponse, ttl_s: float) -> None:
        """Keep a response; one larger than the whole bound is not kept."""
        if key in self._entries:
            self._remove(key)
        self._entries[key] = response, response.created_s + ttl_s
        self.num_bytes += response.num_bytes
        self.shrink_to(self._max_bytes)

    def shrink_to(self, max_bytes: int) -> None:
        """Evict down to this bound, and hold to it from now on."""
        self._max_bytes = max_bytes
        while self.num_bytes > max_bytes:
            self._remove(next(iter(self._entries)))
            self.num_evicted += 1

    async def close(self) -> None:
        """Drop all responses."""
        self._entries.clear()
        self.num_bytes = 0

    def _remove(self, key: str) -> None:
        self.num_bytes -= self._entries.pop(key)[0].num_bytes


class RedisStore:
    """Responses in a Redis that gateways share, bounded by its own `maxmemory` settings.

    While it does not answer, every lookup is a miss.
    """

    def __init__(self, url: str) -> None:
        """Raises `ConfigError` without the client library, and for a URL that is none."""
        try:
            import redis.asyncio
        except ImportError:
            raise ConfigError(
                "cache.redis_url: needs the client library: pip install 'headway[redis]'"
            ) from None
        try:
            pool = redis.asyncio.BlockingConnectionPool.from_url(
                url,
                max_connections=_REDIS_CONNECTIONS,
                timeout=_REDIS_TIMEOUT_S,
                socket_timeout=_REDIS_TIMEOUT_S,
                socket_connect_timeout=_REDIS_TIMEOUT_S,
            )
        except ValueError as error:
            raise ConfigError(f"cache.redis_url: {error}") from None
        self._client = redis.asyncio.Redis.from_pool(pool)
        self._errors = (redis.exceptions.RedisError, OSError, TimeoutError)
        self._resumes_s = 0.0
        self.num_errors = 0

    async def get(self, key: str) -> StoredResponse | None:
        """Return the response, None if there is none or Redis does not answer."""
        if time.monotonic() < self._resumes_s:
            return None
        try:
            data = await self._client.get(_REDIS_PREFIX + key)
            if not isinstance(data, bytes):
                return None
            return msgspec.msgpack.decode(data, type=StoredResponse)
        except (*self._errors, msgspec.MsgspecError) as error:
            self._pause(error)
            return None

    async def put(self, key: str, response: StoredResponse, ttl_s: float) -> None:
        """Keep a response, if Redis answers."""
        if time.monotonic() < self._resumes_s:
            return
        try:
            data = msgspec.msgpack.encode(response)
            await self._client.set(_REDIS_PREFIX + key, data, px=max(1, round(ttl_s * 1000)))
        except self._errors as error:
            self._pause(error)

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    def _pause(self, error: Exception) -> None:
        """Count an error, and leave Redis alone for a while."""
        self.num_errors += 1
        now_s = time.monotonic()
        was_paused, self._resumes_s = now_s < self._resumes_s, now_s + _REDIS_PAUSE_S
        if was_paused:
            return  # it was asked before the first of them failed
        # The class alone: the message may bear the address with its password.
        logger.warning("the response cache's Redis failed (%s)", type(error).__name__)
