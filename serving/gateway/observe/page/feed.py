"""What is the live page told, and when?

A frame a second, as server-sent events, made once for all who look, and not at all while nobody
does.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from serving.gateway.http.errors import ApiError
from serving.gateway.observe.page.latencies import (
    EngineLatency,
    EngineSamples,
    LatencySamples,
    LatencyView,
    engine_latencies,
    latency_views,
)
from serving.gateway.observe.peers.merge import merge
from serving.gateway.observe.recent import RequestWay, newest
from serving.gateway.observe.state import GatewayState

# Of a fleet of hundreds a state takes tens of milliseconds: then frames come less often.
PERIOD_S, MAX_PERIOD_S = 0.5, 5.0
_MAX_SHARE = 0.01  # of a core
_MAX_VIEWERS = 100


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What one gateway puts into a frame."""

    state: GatewayState
    latencies: list[LatencySamples]
    engines: dict[str, EngineSamples]
    requests: list[RequestWay]
    took_s: float  # of its core, to make it


class GatewayRow(msgspec.Struct, frozen=True, kw_only=True):
    """One gateway, beside the others."""

    id: str
    rank: int
    num_connections: int
    num_open_requests: int
    num_placed: int
    num_held: int


class Frame(msgspec.Struct, frozen=True, kw_only=True):
    """All gateways at one moment, or one of them where it is asked for itself."""

    time_s: float  # since the epoch
    state: GatewayState  # as `/headway/state` shows it
    gateways: list[GatewayRow]  # that have answered, by rank
    missing: dict[str, str]  # why others have not, by id
    num_gateways: int  # as configured, or 1
    latencies: list[LatencyView]  # of the last minute, by class
    engines: dict[str, EngineLatency]  # likewise, by engine
    requests: list[RequestWay]  # the last ones, the newest first
    num_viewers: int


class Feed:
    """Sends frames to viewers, at the same moments to all."""

    def __init__(
        self,
        authorize: Callable[[Request], None],
        parts: Callable[[], Awaitable[tuple[list[Part], dict[str, str]]]],
        num_gateways: int = 1,
    ) -> None:
        """`authorize` raises `ApiError` for whoever may not look.

        `parts` returns the gateway's own part, then those of others, and why some have none.
        """
        self._authorize = authorize
        self._parts = parts
        self._num_gateways = num_gateways
        self._num_viewers = 0
        self._event = b""  # the last one
        self._made_s = float("-inf")
        self._making: asyncio.Task[None] | None = None
        self._period_s = PERIOD_S
        self._is_closed = asyncio.Event()

    def routes(self) -> list[Route]:
        """Return where frames are to be had."""
        return [Route("/headway/live", self.get_frames)]

    def close(self) -> None:
        """End all feeds: the gateway is about to end, and shall not wait for them."""
        self._is_closed.set()

    async def get_frames(self, request: Request) -> Response:
        """Answer with a stream of frames, one at once."""
        self._authorize(request)
        if self._num_viewers >= _MAX_VIEWERS:
            raise ApiError(
                429, f"{_MAX_VIEWERS} look at the live page already.", kind="RateLimitError"
            )
        return StreamingResponse(
            self._frames(),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )

    async def _frames(self) -> AsyncIterator[bytes]:
        self._num_viewers += 1
        try:
            while not self._is_closed.is_set():
                yield await self._current()
                now_s = time.monotonic()
                next_s = (now_s // self._period_s + 1.0) * self._period_s
                try:
                    async with asyncio.timeout(next_s - now_s):
                        await self._is_closed.wait()
                except TimeoutError:
                    continue
        finally:
            self._num_viewers -= 1

    async def _current(self) -> bytes:
        """Return the frame of this moment: the last one, if that is not older."""
        if time.monotonic() - self._made_s > self._period_s / 2:
            if self._making is None:
                self._making = asyncio.get_running_loop().create_task(self._make())
            await asyncio.shield(self._making)  # others wait for it, too
        return self._event

    async def _make(self) -> None:
        """Make a frame, and find out how often that may be done."""
        try:
            parts, missing = await self._parts()
            began_s = time.thread_time()
            frame = Frame(
                time_s=time.time(),
                state=merge([part.state for part in parts]),
                gateways=sorted((_row(part.state) for part in parts), key=lambda row: row.rank),
                missing=missing,
                num_gateways=self._num_gateways,
                latencies=latency_views(each for part in parts for each in part.latencies),
                engines=engine_latencies(part.engines for part in parts),
                requests=newest([part.requests for part in parts]),
                num_viewers=self._num_viewers,
            )
            self._event = b"data: " + msgspec.json.encode(frame) + b"\n\n"
            self._made_s = time.monotonic()
            took_s = parts[0].took_s + time.thread_time() - began_s
            most_s = max(took_s, *(part.took_s for part in parts))
            self._period_s = min(MAX_PERIOD_S, max(PERIOD_S, most_s / _MAX_SHARE))
        finally:
            self._making = None


def _row(state: GatewayState) -> GatewayRow:
    return GatewayRow(
        id=state.gateway_id,
        rank=state.rank,
        num_connections=state.num_connections,
        num_open_requests=state.num_open_requests,
        num_placed=state.num_placed,
        num_held=state.held.num_requests,
    )
