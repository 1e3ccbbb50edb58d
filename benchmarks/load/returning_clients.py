"""What do clients do that are refused with `Retry-After`? Some of them return, when told to."""

import asyncio
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from benchmarks.load.loops import poisson_offsets_s
from benchmarks.load.mix import Mix, MixRequest
from router.simulation.figures import Slo
from serving.capacity.client import Client, Record

_TIMEOUT_S = 120.0


@dataclass(slots=True)
class SentRequest:
    """One request that was sent, and what became of it."""

    request: MixRequest
    record: Record
    is_return: bool = False  # sent again after the `Retry-After` of an earlier refusal

    @property
    def ttft_s(self) -> float:
        """Seconds from when it was due to its first byte."""
        return self.record.first_s - self.record.due_s

    @property
    def tpot_s(self) -> float:
        """Mean seconds per token after the first; 0 where there is none."""
        num_more = (self.record.num_output_tokens or 0) - 1
        return (self.record.last_s - self.record.first_s) / num_more if num_more > 0 else 0.0

    @property
    def is_refused(self) -> bool:
        """Whether the answer was a 429."""
        return self.record.status == 429

    def met(self, slo: Slo) -> bool:
        """Whether it completed within the service-level objective."""
        in_time = self.ttft_s <= slo.ttft_target_s(self.request.num_text_tokens)
        return self.record.completed and in_time and self.tpot_s <= slo.tpot_s


@dataclass
class ReturningClients:
    """Clients that send a mix in an open loop; of those refused, one in `return_every` returns."""

    client: Client
    mix: Mix
    model: str
    seed: str
    return_every: int = 0  # 0: nobody returns
    sent: list[SentRequest] = field(default_factory=list)
    _returns: set[asyncio.TimerHandle] = field(default_factory=set)
    _num_refused: int = 0

    async def send_requests(self, rate: float, duration_s: float) -> None:
        """Send `rate` requests per second for `duration_s`; return after the last is sent."""
        start_s = time.perf_counter()
        for request in self._requests(rate, duration_s):
            due_s = start_s + request.offset_s
            if (wait_s := due_s - time.perf_counter()) > 0:
                await asyncio.sleep(wait_s)
            self._send(request, due_s, is_return=False)

    async def wait_for_replies(self) -> None:
        """Return when all requests have ended, those still to be sent again among them."""
        while self._returns:
            await asyncio.sleep(0.1)
        await self.client.wait(_TIMEOUT_S)

    def _requests(self, rate: float, duration_s: float) -> Iterable[MixRequest]:
        """Yield a Poisson process, made while it is sent: ten minutes of bodies are too large."""
        # The word in the seed is older than this class: another one would draw other arrivals.
        rng = random.Random(f"visitors {self.seed}")
        offsets_s = poisson_offsets_s(rate, duration_s, rng)
        for offset_s, request in zip(offsets_s, self.mix.requests(self.seed), strict=False):
            yield replace(request, offset_s=offset_s)

    def _send(self, request: MixRequest, due_s: float, *, is_return: bool) -> None:
        def on_end(record: Record) -> None:
            if record.retry_after_s is None or is_return or not self.return_every:
                return
            self._num_refused += 1
            if self._num_refused % self.return_every == 0:
                self._schedule_return(request, record.retry_after_s)

        salt = f"{self.seed} {is_return}"
        record = self.client.send(self.mix.api_request(request, self.model, salt), on_end)
        record.due_s = due_s
        self.sent.append(SentRequest(request, record, is_return))

    def _schedule_return(self, request: MixRequest, after_s: float) -> None:
        def send_again() -> None:
            self._returns.discard(timer)
            self._send(request, time.perf_counter(), is_return=True)

        timer = asyncio.get_running_loop().call_later(after_s, send_again)
        self._returns.add(timer)
