"""What does a request cost more for being seen: in the log, on the live page, with a trace?

    python -m benchmarks.overhead --seen

Gateways of one process each, without Ray, before the same null engine, asked in turns, the same
rate of requests to each. CPU time is counted by process, so what others do to the machine counts
for all alike. Somebody looks at one gateway's page meanwhile, and its metrics are scraped every
five seconds; spans go to a receiver here. `--checkout FOLDER` adds a gateway of another checkout:
what counting costs shows against one from before it.
"""

import argparse
import asyncio
import contextlib
import gc
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import psutil
from aiohttp import web

from benchmarks.load.loops import open_loop
from benchmarks.overhead.phases import chat
from benchmarks.report.report import Report, Spread
from benchmarks.report.runner import print_progress
from benchmarks.systems.null_engine import MODEL
from router.simulation.figures import brief
from serving.capacity.client import Client
from serving.capacity.launch import MeasureError
from serving.capacity.service import free_ports

_RATE = 250.0  # requests per second and gateway: what a slow machine carries
_KINDS = {"short": 2, "streams of 50 tokens": 50}  # by the tokens of a reply
_WARM_UP_S = 1.0
_READY_S = 60.0
_LOG, _ALL, _TRACES = "log", "log, page and scrapes", "log and traces"
_TARGETS = {_LOG: 1.03, _ALL: 1.03, _TRACES: 1.10}  # of what one costs that is not seen
_SCRAPE_S = 5.0


class _Gateway:
    """A gateway in a process of its own, and its CPU time."""

    def __init__(self, name: str, folder: Path, args: dict[str, Any], engine: dict) -> None:
        self.name = name
        [self.port] = free_ports(1)
        args = {**args, "gateway": {"port": self.port}}
        request = msgspec.json.encode([args, engine]).decode()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.overhead.seen", "gateway", request]
            if folder == Path.cwd()
            # Another checkout may not have this file.
            else [sys.executable, __file__, "gateway", request],
            env={**os.environ, "PYTHONPATH": str(folder)},
            cwd=folder,
        )
        self._usage = psutil.Process(self.process.pid)

    def cpu_s(self) -> float:
        times = self._usage.cpu_times()
        return times.user + times.system

    async def wait(self) -> None:
        """Return when it answers. Raise `MeasureError` if it does not."""
        for _ in range(round(_READY_S / 0.1)):
            with contextlib.suppress(OSError):
                (await asyncio.open_connection("127.0.0.1", self.port))[1].close()
                return
            await asyncio.sleep(0.1)
        raise MeasureError(f"the gateway {self.name} did not start")


def _start_engine() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.overhead.seen", "engine"]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


async def run(span_s: float, num_repeats: int, seed: int, checkout: Path | None) -> Report:
    """Measure all gateways in turns. Return the report."""
    config = {
        "rate_per_s": _RATE,
        "span_s": span_s,
        "num_repeats": num_repeats,
        "other_checkout": str(checkout.name) if checkout else "",
    }
    report = Report("overhead-seen", "measured", seed, config)
    engine = _start_engine()
    gateways: list[_Gateway] = []
    with tempfile.TemporaryDirectory() as logs:
        async with _receiver() as endpoint:
            try:
                assert engine.stdout
                address = msgspec.json.decode(await asyncio.to_thread(engine.stdout.readline))
                log, tracing = {"log": {"dir": logs}}, {"tracing": {"endpoint": endpoint}}
                for name, args in (
                    ("neither", {}),
                    (_LOG, log),
                    (_ALL, log),
                    (_TRACES, {**log, **tracing}),
                ):
                    gateways.append(_Gateway(name, Path.cwd(), args, address))
                if checkout is not None:
                    gateways.append(_Gateway(checkout.name, checkout, {}, address))
                for gateway in gateways:
                    await gateway.wait()
                [watched] = [each for each in gateways if each.name == _ALL]
                async with _looking(watched):
                    await _measure(report, gateways, span_s, num_repeats, random.Random(seed))
            finally:
                for process in (engine, *(gateway.process for gateway in gateways)):
                    process.kill()
                    process.wait()
    return report


async def _measure(
    report: Report,
    gateways: Sequence[_Gateway],
    span_s: float,
    num_repeats: int,
    rng: random.Random,
) -> None:
    for kind, num_tokens in _KINDS.items():
        cpu_us: dict[str, list[float]] = {gateway.name: [] for gateway in gateways}
        for _ in range(num_repeats):
            for gateway in rng.sample(gateways, len(gateways)):
                cpu_us[gateway.name].append(await _cpu_us(gateway, num_tokens, span_s))
            shown = ", ".join(f"{name} {brief(all_us[-1])}" for name, all_us in cpu_us.items())
            print_progress(f"{kind}, µs: {shown}")
            gc.collect()
        for name, all_us in cpu_us.items():
            # Of each round: what was busy then was busy for both.
            ratios = [one / other for one, other in zip(all_us, cpu_us["neither"], strict=True)]
            report.add_row(
                f"{kind.capitalize()}: a gateway's CPU per request",
                seen_by=name,
                µs=Spread.of(all_us),
                of_neither=Spread.of(ratios),
            )
            if (most := _TARGETS.get(name)) is not None:
                report.add_target(f"{kind}, {name}: of neither", Spread.of(ratios), f"<= {most}")


async def _cpu_us(gateway: _Gateway, num_tokens: int, span_s: float) -> float:
    """Return a gateway's CPU time per request, in microseconds."""
    request = chat(num_tokens, stream=True, null_engine_step_ms=0)
    async with Client([f"http://127.0.0.1:{gateway.port}"]) as client:
        await client.connect(16)
        await open_loop(client, _arrivals(request, _WARM_UP_S))
        before_s = gateway.cpu_s()
        records = await open_loop(client, _arrivals(request, span_s))
        await asyncio.sleep(0.2)
        used_s = gateway.cpu_s() - before_s
    failed = [record.error for record in records if not record.completed]
    if failed:
        raise MeasureError(f"{gateway.name}: {len(failed)} requests failed: {failed[0]}")
    return used_s / len(records) * 1e6


def _arrivals(request: Any, span_s: float) -> Iterator[tuple[float, Any]]:
    return ((number / _RATE, request) for number in range(round(span_s * _RATE)))


@contextlib.asynccontextmanager
async def _looking(gateway: _Gateway) -> AsyncIterator[None]:
    """Look at a gateway's live page and scrape its metrics, as a browser and Prometheus do."""
    url = f"http://127.0.0.1:{gateway.port}"

    async def look(session: aiohttp.ClientSession) -> None:
        timeout = aiohttp.ClientTimeout(total=None)
        async with session.get(f"{url}/headway/live", timeout=timeout) as page:
            page.raise_for_status()
            async for _ in page.content.iter_any():
                pass

    async def scrape(session: aiohttp.ClientSession) -> None:
        while True:
            async with session.get(f"{url}/metrics") as metrics:
                metrics.raise_for_status()
                await metrics.read()
            await asyncio.sleep(_SCRAPE_S)

    async with aiohttp.ClientSession() as session:
        watching = [asyncio.create_task(each(session)) for each in (look, scrape)]
        try:
            yield
            for task in watching:
                if task.done():
                    raise MeasureError(f"nobody looked: {task.exception()}")
        finally:
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)


@contextlib.asynccontextmanager
async def _receiver() -> Any:
    """A receiver of spans that throws them away. Yields its URL."""

    async def take(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(content_type="application/x-protobuf")

    app = web.Application(client_max_size=64 * 2**20)
    app.router.add_post("/v1/traces", take)
    runner = web.AppRunner(app)
    await runner.setup()
    [port] = free_ports(1)
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield f"http://127.0.0.1:{port}/v1/traces"
    finally:
        await runner.cleanup()


# --- the processes that are measured ---------------------------------------------------------


async def serve_engine() -> None:
    """Serve a null engine's stream, and print where."""
    from benchmarks.systems.null_engine import NullEngine, NullEngineArgs
    from serving.stream.server import StreamServer

    server = StreamServer(NullEngine(NullEngineArgs()), 65536)
    host, port = await server.listen("127.0.0.1")
    address = {"host": host, "port": port, "secret": server.secret}
    print(msgspec.json.encode(address).decode(), flush=True)
    await asyncio.Event().wait()


async def serve_gateway(args: dict[str, Any], engine: dict) -> None:
    """Serve a gateway before this engine."""
    from serving.config import parse
    from serving.gateway.app import Gateway
    from serving.gateway.http.listener import Listener

    config = parse(args)
    gateway = Gateway(config, "gateway", served_names=(MODEL,))
    gateway.driver.engines.set_members({"engine": engine})
    while not gateway.driver.engines.infos:
        await asyncio.sleep(0.01)
    await Listener(gateway.app, config.gateway).start()
    gc.collect()
    gc.freeze()
    await asyncio.Event().wait()


def main() -> None:
    import uvloop

    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=("engine", "gateway"))
    parser.add_argument("request", nargs="?", default="[]")
    options = parser.parse_args()
    given = msgspec.json.decode(options.request)
    uvloop.run(serve_engine() if options.role == "engine" else serve_gateway(*given))


if __name__ == "__main__":
    main()
