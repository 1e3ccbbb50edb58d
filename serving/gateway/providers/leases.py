"""Budgets that several gateways share: one keeper has them, gateways lease from it."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from router.limits.lease import Grant, LeasedBudget, LeaseServer, News
from router.limits.rate_limit import RateLimits

logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 2.0
# The keeper may go when no gateway has been heard for so long: all its minutes are empty then.
_IDLE_S = 120.0

_encoder = msgspec.msgpack.Encoder()
_decode_news = msgspec.msgpack.Decoder(News).decode
_decode_grant = msgspec.msgpack.Decoder(Grant).decode


class BudgetKeeper:
    """The one that has the budgets of all keys."""

    def __init__(self, *, is_restart: bool = False) -> None:
        self._is_restart = is_restart
        self._lessors: dict[str, LeaseServer] = {}
        self._heard_s = time.monotonic()

    def hear(self, gateway_id: str, key_id: str, limits: str, message: bytes) -> bytes:
        """A gateway's news about one key, with the key's limits as JSON; returns the grant."""
        now_s = self._heard_s = time.monotonic()
        settings = RateLimits.model_validate_json(limits)
        lessor = self._lessors.get(key_id)
        if lessor is None:
            lessor = LeaseServer(settings, now_s, is_restart=self._is_restart)
            self._lessors[key_id] = lessor
        elif lessor.budget.limits != settings:
            lessor.budget.use(settings)
        return _encoder.encode(lessor.hear(gateway_id, _decode_news(message), now_s))

    @property
    def is_idle(self) -> bool:
        """Whether nobody has called for so long that nothing is to be kept."""
        return time.monotonic() > self._heard_s + _IDLE_S


class Ask(Protocol):
    """Hands a gateway's news to the keeper; raises if there is no answer."""

    async def __call__(
        self, gateway_id: str, key_id: str, limits: str, message: bytes
    ) -> bytes: ...


class Leases:
    """A gateway's leased budgets, kept in touch with their keeper."""

    def __init__(self, gateway_id: str, ask: Ask, on_grant: Callable[[], None]) -> None:
        self._gateway_id = gateway_id
        self._ask = ask
        self._on_grant = on_grant
        self._budgets: dict[str, LeasedBudget] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._talks: set[asyncio.Task[None]] = set()

    def make(self, key_id: str, limits: RateLimits) -> LeasedBudget:
        """Return the budget of a key new to this gateway."""
        budget = self._budgets[key_id] = LeasedBudget(limits)
        return budget

    def rearm(self) -> None:
        """Something may have happened: see to it that it is told in time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        dues_s = [
            due_s
            for budget in self._budgets.values()
            if (due_s := budget.next_news_s()) is not None
        ]
        if dues_s:
            delay_s = max(0.0, min(dues_s) - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._talk_all)

    def close(self) -> None:
        """Leave; what is leased runs out."""
        if self._timer is not None:
            self._timer.cancel()
        for talk in self._talks:
            talk.cancel()

    def _talk_all(self) -> None:
        self._timer = None
        now_s = time.monotonic()
        for key_id, budget in self._budgets.items():
            due_s = budget.next_news_s()
            if due_s is not None and due_s <= now_s:
                task = asyncio.get_running_loop().create_task(
                    self._talk(key_id, budget, budget.news(now_s))
                )
                self._talks.add(task)
                task.add_done_callback(self._talks.discard)
        self.rearm()

    async def _talk(self, key_id: str, budget: LeasedBudget, news: News) -> None:
        limits = RateLimits.model_validate(
            budget.limits.model_dump(include=set(RateLimits.model_fields))
        ).model_dump_json()
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                answer = await self._ask(self._gateway_id, key_id, limits, _encoder.encode(news))
        except Exception as error:  # whatever Ray raises: the budget stays shut until it answers
            logger.warning("no answer about the budget of %s: %s", key_id, type(error).__name__)
            budget.on_no_answer()
            self.rearm()
            return
        budget.on_grant(_decode_grant(answer), time.monotonic())
        self._on_grant()
