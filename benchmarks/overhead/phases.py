"""Which load does each phase of the overhead benchmark send, and what did it use meanwhile?

Every phase opens its own connections before it measures, and leaves none open. CPU time is
counted by role, less what the role uses while the system is idle.
"""

import asyncio
import itertools
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from benchmarks.load.loops import ClosedLoop, open_loop, poisson_offsets_s
from benchmarks.systems.null_engine import MODEL
from benchmarks.systems.processes import ResourceUsage, machine_busy_s
from serving.capacity.client import ApiRequest, Client, Record
from serving.capacity.launch import MeasureError
from serving.capacity.service import SystemUnderTest

LOAD_ROLE = "load generator"
OTHERS_ROLE = "others"  # processes of neither the system under test nor the benchmark

NUM_STREAMS = 200
NUM_TOKENS = 200  # per stream
LONG_STREAMS_PER_S = 4.0
PROBES_PER_S = 36.0  # one-token streams, sent only to sample the time to first token
NUM_SHORT_WORKERS = 32
SPACED_PER_S = 500  # short requests, where their rate shall be none of the path's
NUM_OPEN_STREAMS = 1000
OPEN_STREAM_STEP_MS = 200  # 5,000 tokens/s in all: these streams are to be open, not busy
_SIZES = (1, 2, 3, 4)  # tokens of a short reply
_PROMPT = "Tell me something about headway."
WARM_UP_S = 1.0
# Events of a stream that are no token: the role.
_NUM_EXTRA_EVENTS = 1


@dataclass(frozen=True)
class Rate:
    """Tokens per second in all, and the number of streams that share them."""

    tokens_per_s: int
    num_streams: int

    @property
    def step_s(self) -> float:
        """Seconds between the tokens of one stream."""
        return self.num_streams / self.tokens_per_s

    def __str__(self) -> str:
        return f"{self.tokens_per_s:,}"


# The first two at 100 tokens/s per stream, as an engine decodes: a step of the slow one brings a
# tenth of the tokens, so there is less to do at once.
SLOW = Rate(2_000, 20)
BUSY = Rate(20_000, NUM_STREAMS)
FAST = Rate(50_000, NUM_STREAMS)


@dataclass(frozen=True)
class Durations:
    """Seconds per phase, and the number of repeats of all phases."""

    num_repeats: int = 3
    idle_s: float = 4.0
    ttft_s: float = 7.0
    slow_s: float = 5.0
    busy_s: float = 5.0
    fast_s: float = 3.0
    flat_out_s: float = 3.0
    short_s: float = 1.5


@dataclass
class Window:
    """What happened between two readings of clocks and counters."""

    elapsed_s: float
    num_tokens: int
    num_pieces: int
    num_requests: int
    cpu_s: defaultdict[str, float]  # by role, net of idle

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.elapsed_s

    @property
    def requests_per_s(self) -> float:
        return self.num_requests / self.elapsed_s

    def cores(self, role: str) -> float:
        return self.cpu_s[role] / self.elapsed_s


@dataclass(eq=False)
class PhaseRunner:
    """Runs the phases on one system; counts the requests that failed, by reason."""

    system: SystemUnderTest
    durations: Durations
    failures: Counter[str] = field(default_factory=Counter)
    idle_cores: defaultdict[str, float] = field(default_factory=partial(defaultdict, float))
    usages: list[ResourceUsage] = field(init=False)

    def __post_init__(self) -> None:
        self.usages = [ResourceUsage(launch) for launch in self.system.launches]

    async def measure_idle(self) -> None:
        """Measure what each role uses while nothing is asked of the system."""
        await asyncio.sleep(1.0)  # until the work of starting is done
        async with Client(self.system.urls) as client:
            window = await self._window(client, self.durations.idle_s)
        for role in window.cpu_s:
            if role != OTHERS_ROLE:
                self.idle_cores[role] = window.cores(role)

    async def stream_at_rate(self, rate: Rate, span_s: float) -> tuple[Window, list[float]]:
        """Keep streams at this rate. Return the window and the times to first byte."""
        request = chat(NUM_TOKENS, null_engine_step_ms=rate.step_s * 1000)
        async with Client(self.system.urls) as client:
            await client.connect(rate.num_streams)
            loop = ClosedLoop(client, itertools.repeat(request), rate.num_streams)
            # Spread over the duration of one stream, so that they do not all end at once.
            await loop.start(ramp_s=NUM_TOKENS * rate.step_s)
            await asyncio.sleep(0.5)
            start_s = time.perf_counter()
            window = await self._window(client, span_s)
            end_s = time.perf_counter()
            records = self.count_failures(await loop.stop())
        return window, [
            record.ttft_s
            for record in records
            if record.completed and start_s <= record.due_s < end_s
        ]

    async def stream_flat_out(self) -> Window:
        """Send as many tokens as the path carries over 200 streams. Return the window."""
        requests = itertools.repeat(chat(NUM_TOKENS, null_engine_step_ms=0))
        return await self._saturate(requests, NUM_STREAMS, self.durations.flat_out_s)

    async def send_short_requests(self, stream: bool) -> Window:
        """Send as many requests of one to four tokens as the path carries. Return the window."""
        requests = [chat(num_tokens, stream, null_engine_step_ms=0) for num_tokens in _SIZES]
        return await self._saturate(
            itertools.cycle(requests), NUM_SHORT_WORKERS, self.durations.short_s
        )

    async def send_spaced_requests(self, span_s: float) -> Window:
        """Send short requests at a rate that every path carries. Return the window.

        Of what is done so many times per second, each has the same part then, on any machine.
        """
        requests = [chat(num_tokens, stream=False, null_engine_step_ms=0) for num_tokens in _SIZES]
        arrivals = [
            (number / SPACED_PER_S, request)
            for number, request in zip(
                range(round((WARM_UP_S + span_s) * SPACED_PER_S)), itertools.cycle(requests)
            )
        ]
        async with Client(self.system.urls) as client:
            await client.connect(NUM_SHORT_WORKERS)
            sending = asyncio.create_task(open_loop(client, arrivals))
            await asyncio.sleep(WARM_UP_S)
            window = await self._window(client, span_s)
            self.count_failures(await sending)
        return window

    async def hold_open_streams(
        self, measure: Callable[[], float], count_streams: Callable[[], int]
    ) -> tuple[float, float, int]:
        """Open 1,000 streams, then abort them all at once.

        Return `measure()` before and with them, and `count_streams()`, the streams left in the
        engines, one second after.
        """
        before = measure()
        async with Client(self.system.urls) as client:
            await client.connect(NUM_OPEN_STREAMS)
            request = chat(1_000_000, null_engine_step_ms=OPEN_STREAM_STEP_MS)
            records = [client.send(request) for _ in range(NUM_OPEN_STREAMS)]
            deadline_s = time.perf_counter() + 30.0
            while not all(record.first_s or record.error for record in records):
                if time.perf_counter() > deadline_s:
                    break
                await asyncio.sleep(0.1)
            await asyncio.sleep(1.0)
            self.failures.update(
                record.error or "no first token after 30 s"
                for record in records
                if record.error or not record.first_s
            )
            during = measure()
            client.vanish()
            await asyncio.sleep(1.0)
            num_left = await asyncio.to_thread(count_streams)
        return before, during, num_left

    async def _saturate(
        self,
        requests: Iterator[ApiRequest],
        num_workers: int,
        span_s: float,
    ) -> Window:
        async with Client(self.system.urls) as client:
            await client.connect(num_workers)
            loop = ClosedLoop(client, requests, num_workers)
            await loop.start()
            await asyncio.sleep(0.5)
            window = await self._window(client, span_s)
            self.count_failures(await loop.stop())
        return window

    async def _window(self, client: Client, span_s: float) -> Window:
        for usage in self.usages:
            usage.refresh()
        cpu_before = self._cpu_s()
        start_s, num_events, num_ended = time.perf_counter(), client.num_events, client.num_ended
        num_pieces = client.num_pieces
        await asyncio.sleep(span_s)
        elapsed_s = time.perf_counter() - start_s
        num_requests = client.num_ended - num_ended
        num_tokens = client.num_events - num_events - _NUM_EXTRA_EVENTS * num_requests
        cpu_s = self._cpu_s()
        for role, before_s in cpu_before.items():
            cpu_s[role] -= before_s
        for role, cores in self.idle_cores.items():
            cpu_s[role] -= cores * elapsed_s
        return Window(elapsed_s, num_tokens, client.num_pieces - num_pieces, num_requests, cpu_s)

    def _cpu_s(self) -> defaultdict[str, float]:
        used: defaultdict[str, float] = defaultdict(float)
        for usage in self.usages:
            for role, used_s in usage.cpu_s().items():
                used[role] += used_s
        used[LOAD_ROLE] = time.process_time()
        used[OTHERS_ROLE] = machine_busy_s() - sum(used.values())
        return used

    def count_failures(self, records: list[Record]) -> list[Record]:
        """Count the failed requests, by reason. Return all records.

        Raises `MeasureError` if every request failed.
        """
        failed = Counter(record.error for record in records if not record.completed)
        self.failures.update(failed)
        if failed.total() == len(records):
            raise MeasureError(f"{self.system.name}: every request failed: {failed}")
        return records


async def send_paired(
    first: PhaseRunner, second: PhaseRunner, span_s: float, seed: str
) -> tuple[list[Record], list[Record]]:
    """Send a low load to both systems at the same time. Return the completed requests of each.

    Poisson arrivals go to one or the other at random, so that other work of the machine delays
    both alike.
    """
    rng = random.Random(seed)
    rate = 2 * (LONG_STREAMS_PER_S + PROBES_PER_S)
    arrivals: dict[PhaseRunner, list[tuple[float, ApiRequest]]] = {first: [], second: []}
    for offset_s in poisson_offsets_s(rate, WARM_UP_S + span_s, rng):
        long = rng.random() < LONG_STREAMS_PER_S / (LONG_STREAMS_PER_S + PROBES_PER_S)
        runner = first if rng.random() < 0.5 else second
        arrivals[runner].append((offset_s, chat(NUM_TOKENS if long else 1)))

    async def send(runner: PhaseRunner) -> list[Record]:
        async with Client(runner.system.urls) as client:
            await client.connect(64)
            start_s = time.perf_counter()
            records = runner.count_failures(await open_loop(client, arrivals[runner]))
        return [
            record for record in records if record.completed and record.due_s - start_s >= WARM_UP_S
        ]

    one, other = await asyncio.gather(send(first), send(second))
    return one, other


def chat(num_tokens: int, stream: bool = True, **extra: float) -> ApiRequest:
    """Return a request for a reply of so many tokens; `extra` goes into its body."""
    return ApiRequest.chat(MODEL, _PROMPT, num_tokens, stream, **extra)
