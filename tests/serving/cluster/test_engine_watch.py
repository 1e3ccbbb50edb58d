"""When a replica gives its engine up, and when it does not."""

import asyncio
import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from serving.cluster.engine_watch import EngineWatch, anonymous_bytes
from serving.cluster.loop_thread import LoopThread
from serving.config import EngineConfig
from serving.planning.memory import growth_allowed
from serving.stream.server import StreamServer
from tests.support.fakes import FakeEngine

MIB = 2**20
# Takes memory as told: a number of MiB per line.
GROWING = """
import sys
taken = []
print("ready", flush=True)
for line in sys.stdin:
    taken.append(bytearray(int(line) * 2**20))
    print("taken", flush=True)
"""


class Line:
    """A line to a process that computes nothing."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def carry(self, connection: int) -> None: ...

    def beat(self) -> None: ...


class Watched:
    """An engine on a loop of its own, and what its watch has said."""

    def __init__(self, pid: int = 0, **settings) -> None:
        self.reasons: list[str] = []
        self.loop = LoopThread("engine")
        self.engine = FakeEngine()
        self.engine.lifeline = Line(pid) if pid else None
        self.settings = {"hang_timeout_s": 60.0, "block_timeout_s": 60.0, **settings}

    async def watch(self, seconds: float) -> list[str]:
        """Watch for so long, or until something is wrong; return what is."""

        async def serve() -> StreamServer:
            server = StreamServer(self.engine, 1000)
            await server.listen("127.0.0.1")
            return server

        async def close() -> None:
            server.close()

        server = await self.loop.run(serve())
        config = EngineConfig(**self.settings)
        max_growth = config.max_growth_bytes
        assert max_growth != "auto"
        watch = EngineWatch(config, self.loop, server, max_growth, self.reasons.append)
        task = asyncio.create_task(watch.run())
        deadline_s = time.monotonic() + seconds
        while not self.reasons and time.monotonic() < deadline_s:
            await asyncio.sleep(0.02)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await self.loop.run(close())
        return self.reasons

    async def block(self, seconds: float) -> None:
        """Keep the engine's event loop from turning."""

        def work() -> None:
            time.sleep(seconds)

        async def run() -> None:
            work()

        threading.Thread(target=asyncio.run, args=(self.loop.run(run()),), daemon=True).start()


def settings(**more) -> dict:
    return {"max_growth_bytes": None, **more}


async def test_of_an_engine_that_is_well_nothing_is_said():
    assert await Watched(**settings(hang_timeout_s=0.5, block_timeout_s=0.5)).watch(2.5) == []


async def test_a_dead_engine():
    watched = Watched(**settings())
    watched.engine.dead = True
    assert (await watched.watch(5.0))[0] == "the engine is dead"


async def test_a_core_that_does_not_answer():
    watched = Watched(**settings(hang_timeout_s=1.0))
    watched.engine.gate.clear()
    begun_s = time.monotonic()
    [reason, *_] = await watched.watch(10.0)
    assert "has not answered for 1 s (engine.hang_timeout_s)" in reason
    assert 1.0 <= time.monotonic() - begun_s < 3.0


async def test_a_busy_event_loop_is_not_held_against_the_core():
    """The ping is under way for longer than a core may take: nobody could read its answer."""
    watched = Watched(**settings(hang_timeout_s=1.0))
    task = asyncio.create_task(watched.watch(6.0))
    await asyncio.sleep(0.3)
    await watched.block(4.0)
    assert await task == []


async def test_an_event_loop_that_is_busy_for_ever():
    watched = Watched(**settings(hang_timeout_s=1.0, block_timeout_s=2.0))
    task = asyncio.create_task(watched.watch(10.0))
    await asyncio.sleep(0.3)
    await watched.block(6.0)
    [reason, *_] = await task
    assert "has been busy for 2 s (engine.block_timeout_s)" in reason


@contextlib.contextmanager
def growing() -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(
        [sys.executable, "-c", GROWING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def grow(process: subprocess.Popen, num_mib: int) -> None:
    process.stdin.write(f"{num_mib}\n")
    process.stdin.flush()
    assert process.stdout.readline() == "taken\n"


async def test_a_core_that_grows_beyond_its_bound_dies_alone(caplog):
    with growing() as process:
        grow(process, 100)  # before it is ready
        watched = Watched(process.pid, max_growth_bytes=64 * MIB)
        task = asyncio.create_task(watched.watch(3.0))
        await asyncio.sleep(0.5)
        grow(process, 40)
        await asyncio.sleep(0.6)
        assert process.poll() is None
        grow(process, 40)
        async with asyncio.timeout(2):
            while process.poll() is None:
                await asyncio.sleep(0.02)
        assert await task == []  # the engine will say that it is dead
        [line] = [each.getMessage() for each in caplog.records if each.levelname == "ERROR"]
        assert "80 MiB more than when it was ready, and 64 MiB are allowed" in line
        assert "engine.max_growth_bytes" in line


async def test_without_a_bound_it_may_grow():
    with growing() as process:
        task = asyncio.create_task(Watched(process.pid, **settings()).watch(1.5))
        await asyncio.sleep(0.3)
        grow(process, 200)
        assert await task == []
        assert process.poll() is None


def test_memory_of_its_own():
    with growing() as process:
        before = anonymous_bytes(process.pid)
        grow(process, 50)
        assert 50 * MIB <= anonymous_bytes(process.pid) - before < 52 * MIB
        assert before < psutil.Process(process.pid).memory_info().rss
    assert anonymous_bytes(process.pid) == 0


@pytest.mark.parametrize(
    ("bound", "expected"),
    [
        ("auto", 2 * 2**30),  # of 32 GiB an eighth, in halves
        (5, 5),
        (None, None),
    ],
)
def test_the_bound_of_growth(bound, expected):
    config = EngineConfig(max_growth_bytes=bound)
    assert growth_allowed(config, 32 * 2**30, 2) == expected
    if bound == "auto":
        assert growth_allowed(config, 4 * 2**30, 2) == 2**30  # no less than one GiB
