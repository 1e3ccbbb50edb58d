"""What `overhead` measures, phase by phase.

Every phase opens its own connections before it measures and leaves none
behind. CPU time is taken by role and net of what the role uses while nothing
is asked of it.
"""

import asyncio
import itertools
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from benchmarks.load.loops import ClosedLoop, open_loop
from benchmarks.systems.null_engine import MODEL
from benchmarks.systems.processes import ResourceUsage, machine_busy_s
from serving.capacity.client import Call, Client, Record
from serving.capacity.launch import MeasureError
from serving.capacity.service import SystemUnderTest

LOAD_ROLE = "load generator"
OTHERS_ROLE = "others"  # processes that are neither the subject's nor ours

NUM_STREAMS = 200
NUM_TOKENS = 200  # per stream
BUSY_TOKENS_PER_S = 20_000  # 200 streams of 100 tokens/s
FAST_TOKENS_PER_S = 50_000
LONG_STREAMS_PER_S = 4.0
PROBES_PER_S = 36.0  # one-token streams that only sample the time to first token
NUM_SHORT_WORKERS = 32
NUM_CROWD = 1000
CROWD_STEP_MS = 200  # 5,000 tokens/s in all: the crowd is to be open, not to be busy
_PROMPT = "Tell me something about headway."
_WARM_UP_S = 1.0
# An event per stream that is no token: the role.
_NUM_EXTRA_EVENTS = 1


@dataclass(frozen=True)
class Durations:
    """Seconds per phase, and how often all is repeated."""

    num_repeats: int = 3
    idle_s: float = 4.0
    ttft_s: float = 7.0
    busy_s: float = 5.0
    fast_s: float = 3.0
    flat_out_s: float = 3.0
    short_s: float = 1.5


@dataclass
class Window:
    """What happened between two looks at clocks and counters."""

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
class Prober:
    """Runs the phases on one subject; counts the requests that failed, by reason."""

    subject: SystemUnderTest
    durations: Durations
    failures: Counter[str] = field(default_factory=Counter)
    idle_cores: defaultdict[str, float] = field(default_factory=partial(defaultdict, float))
    usages: list[ResourceUsage] = field(init=False)

    def __post_init__(self) -> None:
        self.usages = [ResourceUsage(launch) for launch in self.subject.launches]

    async def idle(self) -> None:
        """Learn what each role uses while nothing is asked of it."""
        await asyncio.sleep(1.0)  # what the start left to do
        async with Client(self.subject.urls) as client:
            window = await self._window(client, self.durations.idle_s)
        for role in window.cpu_s:
            if role != OTHERS_ROLE:
                self.idle_cores[role] = window.cores(role)

    async def paced(self, tokens_per_s: float, span_s: float) -> tuple[Window, list[float]]:
        """200 streams at so many tokens/s in all; return the window and times to first byte."""
        step_s = NUM_STREAMS / tokens_per_s
        call = chat(NUM_TOKENS, stand_in_step_ms=step_s * 1000)
        async with Client(self.subject.urls) as client:
            await client.connect(NUM_STREAMS)
            loop = ClosedLoop(client, itertools.repeat(call), NUM_STREAMS)
            # Spread over one stream's life, so that they do not all end at once.
            await loop.start(ramp_s=NUM_TOKENS * step_s)
            await asyncio.sleep(0.5)
            start_s = time.perf_counter()
            window = await self._window(client, span_s)
            end_s = time.perf_counter()
            records = self.checked(await loop.stop())
        return window, [
            record.ttft_s
            for record in records
            if record.completed and start_s <= record.due_s < end_s
        ]

    async def flat_out(self) -> Window:
        """As many tokens as the path carries over 200 streams."""
        call = chat(NUM_TOKENS, stand_in_step_ms=0)
        return await self._saturate(itertools.repeat(call), NUM_STREAMS, self.durations.flat_out_s)

    async def short(self, stream: bool) -> Window:
        """As many requests of one to four tokens as the path carries."""
        calls = [chat(num_tokens, stream, stand_in_step_ms=0) for num_tokens in (1, 2, 3, 4)]
        return await self._saturate(
            itertools.cycle(calls), NUM_SHORT_WORKERS, self.durations.short_s
        )

    async def crowd(
        self, measure: Callable[[], float], count_streams: Callable[[], int]
    ) -> tuple[float, float, int]:
        """Open 1,000 streams, then abort them all at once.

        Returns `measure()` before and with them, and `count_streams()`, the streams
        left in the engines, one second after.
        """
        before = measure()
        async with Client(self.subject.urls) as client:
            await client.connect(NUM_CROWD)
            call = chat(1_000_000, stand_in_step_ms=CROWD_STEP_MS)
            records = [client.send(call) for _ in range(NUM_CROWD)]
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
        calls: "itertools.repeat[Call] | itertools.cycle[Call]",
        num_workers: int,
        span_s: float,
    ) -> Window:
        async with Client(self.subject.urls) as client:
            await client.connect(num_workers)
            loop = ClosedLoop(client, calls, num_workers)
            await loop.start()
            await asyncio.sleep(0.5)
            window = await self._window(client, span_s)
            self.checked(await loop.stop())
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

    def checked(self, records: list[Record]) -> list[Record]:
        """Count the failed ones; raise `MeasureError` when there is no other."""
        failed = Counter(record.error for record in records if not record.completed)
        self.failures.update(failed)
        if failed.total() == len(records):
            raise MeasureError(f"{self.subject.name}: every request failed: {failed}")
        return records


async def paired_ttft(
    first: Prober, second: Prober, span_s: float, seed: str
) -> tuple[list[Record], list[Record]]:
    """Return both subjects' completed requests at a low load at the same time.

    Poisson arrivals are dealt to one or the other by a coin, so that whatever
    else the machine does meanwhile befalls both alike.
    """
    rng = random.Random(seed)
    rate = 2 * (LONG_STREAMS_PER_S + PROBES_PER_S)
    arrivals: dict[Prober, list[tuple[float, Call]]] = {first: [], second: []}
    offset_s = 0.0
    while (offset_s := offset_s + rng.expovariate(rate)) < _WARM_UP_S + span_s:
        long = rng.random() < LONG_STREAMS_PER_S / (LONG_STREAMS_PER_S + PROBES_PER_S)
        prober = first if rng.random() < 0.5 else second
        arrivals[prober].append((offset_s, chat(NUM_TOKENS if long else 1)))

    async def run(prober: Prober) -> list[Record]:
        async with Client(prober.subject.urls) as client:
            await client.connect(64)
            start_s = time.perf_counter()
            records = prober.checked(await open_loop(client, arrivals[prober]))
        return [
            record
            for record in records
            if record.completed and record.due_s - start_s >= _WARM_UP_S
        ]

    one, other = await asyncio.gather(run(first), run(second))
    return one, other


def chat(num_tokens: int, stream: bool = True, **extra: float) -> Call:
    """A streamed or whole reply of so many tokens."""
    return Call.chat(MODEL, _PROMPT, num_tokens, stream, **extra)
