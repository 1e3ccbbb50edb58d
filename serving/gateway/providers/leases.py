"""How are the rate limits that several gateways share kept, and how do gateways lease from them?

One `LeaseKeeper` has the lease servers of all keys (`router.limits.lease`); each gateway has a
`Leases`, which talks to it on time.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from router.limits.lease import LeasedLimiter, LeaseGrant, LeaseServer, LeaseUpdate
from router.limits.settings import RateLimits

logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 2.0
# The keeper may end when no gateway has been heard for so long: all its windows of a minute are
# empty then.
_IDLE_S = 120.0

_encoder = msgspec.msgpack.Encoder()
_decode_update = msgspec.msgpack.Decoder(LeaseUpdate).decode
_decode_grant = msgspec.msgpack.Decoder(LeaseGrant).decode


class LeaseKeeper:
    """The lease servers of all keys."""

    def __init__(self, *, is_restart: bool = False) -> None:
        self._is_restart = is_restart
        self._servers: dict[str, LeaseServer] = {}
        self._heard_s = time.monotonic()

    def answer_update(self, gateway_id: str, key_id: str, limits: str, message: bytes) -> bytes:
        """Take in a gateway's update about one key. Return the grant.

        `limits` are the key's, as JSON; update and grant are msgpack.
        """
        now_s = self._heard_s = time.monotonic()
        settings = RateLimits.model_validate_json(limits)
        server = self._servers.get(key_id)
        if server is None:
            server = LeaseServer(settings, now_s, is_restart=self._is_restart)
            self._servers[key_id] = server
        elif server.limiter.limits != settings:
            server.limiter.use_limits(settings)
        return _encoder.encode(server.answer_update(gateway_id, _decode_update(message), now_s))

    @property
    def is_idle(self) -> bool:
        """Whether no gateway has called for so long that nothing has to be kept."""
        return time.monotonic() > self._heard_s + _IDLE_S


class SendUpdate(Protocol):
    """Sends a gateway's update to the keeper. Returns its grant; raises if there is no answer."""

    async def __call__(
        self, gateway_id: str, key_id: str, limits: str, message: bytes
    ) -> bytes: ...


class Leases:
    """A gateway's leased limiters, kept in touch with their keeper."""

    def __init__(
        self, gateway_id: str, send_update: SendUpdate, on_grant: Callable[[], None]
    ) -> None:
        self._gateway_id = gateway_id
        self._send = send_update
        self._on_grant = on_grant
        self._limiters: dict[str, LeasedLimiter] = {}  # by key id
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def make_limiter(self, key_id: str, limits: RateLimits) -> LeasedLimiter:
        """Return the limiter of a key new to this gateway."""
        limiter = self._limiters[key_id] = LeasedLimiter(limits)
        return limiter

    def rearm_timer(self) -> None:
        """Set the timer to the next due update: something may have happened."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        dues_s = [
            due_s
            for limiter in self._limiters.values()
            if (due_s := limiter.next_update_s()) is not None
        ]
        if dues_s:
            delay_s = max(0.0, min(dues_s) - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._send_due_updates)

    def close(self) -> None:
        """Send no more; what is leased runs out."""
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()

    def _send_due_updates(self) -> None:
        self._timer = None
        now_s = time.monotonic()
        for key_id, limiter in self._limiters.items():
            due_s = limiter.next_update_s()
            if due_s is not None and due_s <= now_s:
                task = asyncio.get_running_loop().create_task(
                    self._send_update(key_id, limiter, limiter.make_update(now_s))
                )
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        self.rearm_timer()

    async def _send_update(self, key_id: str, limiter: LeasedLimiter, update: LeaseUpdate) -> None:
        """Send an update and hand the answer to its limiter."""
        limits = RateLimits.model_validate(
            limiter.limits.model_dump(include=set(RateLimits.model_fields))
        ).model_dump_json()
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                answer = await self._send(self._gateway_id, key_id, limits, _encoder.encode(update))
        except Exception as error:  # whatever Ray raises: nothing is sent until it answers
            logger.warning("no answer about the limits of %s: %s", key_id, type(error).__name__)
            limiter.on_no_answer()
            self.rearm_timer()
            return
        limiter.on_grant(_decode_grant(answer), time.monotonic())
        self._on_grant()
