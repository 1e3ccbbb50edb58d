"""Where do emulated engines that fail meet the deployed gateway? Here, over real sockets."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from benchmarks.report.report import Report
from benchmarks.systems.faulty_engine import FaultyFleet
from serving.capacity.service import free_ports
from serving.config import parse
from serving.engine.emulated.engine import EmulatedArgs, EmulatedEngine
from serving.gateway.app import Gateway
from serving.gateway.http.listener import Listener
from serving.gateway.observe.state import GatewayState

MODEL = "emulated"
PROFILE = "h100-llama8b"
# Every step takes so many times as long as the profile says. One process can pass on, read and
# compare just so many tokens: 8 engines with 48 streams, about 33 ms per token.
SLOWNESS = 5.0


def make_engine(rank: int) -> EmulatedEngine:
    """Return an engine of its own noise."""
    engine = EmulatedEngine(EmulatedArgs(profile=PROFILE), MODEL, rank)
    engine.model.slowness = SLOWNESS
    return engine


@asynccontextmanager
async def open_gateway() -> AsyncIterator[tuple[Gateway, httpx.AsyncClient]]:
    """Yield a gateway that listens, and a client of it; close both at the end."""
    (port,) = free_ports(1)
    gateway = Gateway(parse({"gateway": {"port": port}}), "gateway")
    listener = Listener(gateway.app, gateway.config.gateway)
    await listener.start()
    limits = httpx.Limits(max_connections=None)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=limits) as http:
            yield gateway, http
    finally:
        gateway.close()
        await listener.stop()


async def add_engines(fleet: FaultyFleet, gateway: Gateway) -> None:
    """Return once the gateway knows all engines of the fleet."""
    for engine in fleet.engines:
        await fleet.add_engine(engine)
    while len(gateway.driver.engines.infos) < len(fleet.engines):
        await asyncio.sleep(0.05)


def config_of_engines() -> dict[str, str | float]:
    """Return what a report has to say of the engines."""
    return {"profile": PROFILE, "slowness": SLOWNESS}


def report_leftovers(report: Report, state: GatewayState) -> None:
    """Add the target that nothing is left over once all is answered."""
    num_open = state.num_open_requests + state.num_placed + state.num_record_bytes
    num_booked = sum(replica.ledger.num_open for replica in state.replicas.values())
    report.add_target("requests and bookings left over", num_open + num_booked, "== 0")


def note_engines(report: Report) -> None:
    """Add what one has to know of the engines."""
    report.add_note(
        f"Engines are emulated, every step {SLOWNESS:g} times as long as the profile says. "
        "They share one process with gateway and clients."
    )
