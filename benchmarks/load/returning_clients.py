"""Clients that come at their own times, and, when told to come later, sometimes do."""

import asyncio
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from benchmarks.load.mix import Ask, Mix
from router.settings import RouterSettings
from router.simulation.figures import Slo
from serving.capacity.client import Call, Client, Record

_TIMEOUT_S = 120.0


@dataclass(slots=True)
class Visit:
    """One request and what became of it."""

    ask: Ask
    record: Record
    is_return: bool = False  # by an earlier one's `Retry-After`

    @property
    def ttft_s(self) -> float:
        """From when it was due to its first byte."""
        return self.record.first_s - self.record.due_s

    @property
    def tpot_s(self) -> float:
        """Mean time per token after the first; 0 where there is none."""
        num_more = (self.record.num_output_tokens or 0) - 1
        return (self.record.last_s - self.record.first_s) / num_more if num_more > 0 else 0.0

    @property
    def is_refused(self) -> bool:
        return self.record.status == 429

    def met(self, slo: Slo) -> bool:
        """Whether it got what was promised."""
        ttft_target_s = slo.ttft_s
        if ttft_target_s is None:
            router = RouterSettings()
            tokens_s = router.ttft_target_s_per_token * self.ask.num_text_tokens
            ttft_target_s = router.ttft_target_base_s + tokens_s
        in_time = self.ttft_s <= ttft_target_s and self.tpot_s <= slo.tpot_s
        return self.record.completed and in_time


@dataclass
class ReturningClients:
    """Sends a mix, open loop; of those refused, one in `come_back_every` comes back once."""

    client: Client
    mix: Mix
    model: str
    seed: str
    come_back_every: int = 0  # 0: nobody does
    visits: list[Visit] = field(default_factory=list)
    _returns: set[asyncio.TimerHandle] = field(default_factory=set)
    _num_refused: int = 0

    async def come(self, rate: float, duration_s: float) -> None:
        """Send `rate` requests per second for so long; return after the last is sent."""
        start_s = time.perf_counter()
        for ask in self._asks(rate, duration_s):
            due_s = start_s + ask.offset_s
            if (wait_s := due_s - time.perf_counter()) > 0:
                await asyncio.sleep(wait_s)
            self._send(ask, due_s, is_return=False)

    async def leave(self) -> None:
        """Return when all have their answer, those still to come back among them."""
        while self._returns:
            await asyncio.sleep(0.1)
        await self.client.wait(_TIMEOUT_S)

    def _asks(self, rate: float, duration_s: float) -> Iterable[Ask]:
        """A Poisson process, made as it is needed: bodies of ten minutes would fill memory."""
        rng = random.Random(f"visitors {self.seed}")
        offset_s = 0.0
        for ask in self.mix.asks(self.seed):
            offset_s += rng.expovariate(rate)
            if offset_s >= duration_s:
                return
            yield Ask(ask.number, offset_s, ask.kind, ask.num_text_tokens, ask.num_output_tokens)

    def _send(self, ask: Ask, due_s: float, *, is_return: bool) -> None:
        call: Call = self.mix.call(ask, self.model, f"{self.seed} {is_return}")

        def on_end(record: Record) -> None:
            if record.retry_after_s is None or is_return or not self.come_back_every:
                return
            self._num_refused += 1
            if self._num_refused % self.come_back_every == 0:
                self._come_back(ask, record.retry_after_s)

        record = self.client.send(call, on_end)
        record.due_s = due_s
        self.visits.append(Visit(ask, record, is_return))

    def _come_back(self, ask: Ask, after_s: float) -> None:
        def again() -> None:
            self._returns.discard(timer)
            self._send(ask, time.perf_counter(), is_return=True)

        timer = asyncio.get_running_loop().call_later(after_s, again)
        self._returns.add(timer)
