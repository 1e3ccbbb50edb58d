"""What is the live page told, and when?

A frame a second, as server-sent events, made once for all who look, and not at all while nobody
does.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from serving.gateway.http.errors import ApiError
from serving.gateway.observe.page.latencies import LatencyView
from serving.gateway.observe.recent import RequestWay
from serving.gateway.observe.state import GatewayState

# Of a fleet of hundreds a state takes tens of milliseconds: then frames come less often.
PERIOD_S, MAX_PERIOD_S = 0.5, 5.0
_MAX_SHARE = 0.01  # of a core
_MAX_VIEWERS = 100


class Frame(msgspec.Struct, frozen=True, kw_only=True):
    """The gateway at one moment."""

    time_s: float  # since the epoch
    state: GatewayState  # as `/headway/state` shows it
    latencies: list[LatencyView]  # of the last minute, by class
    requests: list[RequestWay]  # the last ones, the newest first
    num_viewers: int


class Feed:
    """Sends frames to viewers, at the same moments to all."""

    def __init__(
        self,
        authorize: Callable[[Request], None],
        state: Callable[[], GatewayState],
        latencies: Callable[[float], list[LatencyView]],
        requests: Callable[[], list[RequestWay]],
    ) -> None:
        """`authorize` raises `ApiError` for whoever may not look."""
        self._authorize = authorize
        self._state = state
        self._latencies = latencies
        self._requests = requests
        self._num_viewers = 0
        self._event = b""  # the last one
        self._made_s = float("-inf")
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
                yield self._current()
                now_s = time.monotonic()
                next_s = (now_s // self._period_s + 1.0) * self._period_s
                try:
                    async with asyncio.timeout(next_s - now_s):
                        await self._is_closed.wait()
                except TimeoutError:
                    continue
        finally:
            self._num_viewers -= 1

    def _current(self) -> bytes:
        """Return the frame of this moment: the last one, if that is not older."""
        now_s = time.monotonic()
        if now_s - self._made_s > self._period_s / 2:
            self._made_s, began_s = now_s, time.thread_time()
            frame = Frame(
                time_s=time.time(),
                state=self._state(),
                latencies=self._latencies(now_s),
                requests=self._requests(),
                num_viewers=self._num_viewers,
            )
            self._event = b"data: " + msgspec.json.encode(frame) + b"\n\n"
            took_s = time.thread_time() - began_s
            self._period_s = min(MAX_PERIOD_S, max(PERIOD_S, took_s / _MAX_SHARE))
        return self._event
