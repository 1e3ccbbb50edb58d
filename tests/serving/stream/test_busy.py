"""An engine of several gateways gives back what it is too busy for, over real sockets."""

import asyncio
import contextlib

import msgspec

from serving.stream.client import StreamClient
from serving.stream.frames import Busy, End, Submit
from serving.stream.server import StreamServer
from tests.serving.stream.test_stream import WINDOW_BYTES, Recorder
from tests.support.fakes import FakeEngine

OF_OTHERS = 1000  # tokens that the engine has to prefill for others


class BusyEngine(FakeEngine):
    """Has `OF_OTHERS` tokens to prefill."""

    def snapshot(self, seq, accountings):
        state = super().snapshot(seq, accountings)
        return msgspec.structs.replace(state, num_pending_prefill_tokens=OF_OTHERS)


class Gateway(Recorder):
    """Keeps what came in one order."""

    def on_busy(self, client, frame):
        self.snapshot_before = self.snapshots[-1]
        self.on_head(client, frame)


def submit(stream: int, max_pending_tokens: int) -> Submit:
    request = Submit(stream, f"id{stream}", 5, 0, 0, "POST", "/v1/completions", [], b"{}")
    return msgspec.structs.replace(request, max_pending_tokens=max_pending_tokens)


@contextlib.asynccontextmanager
async def connected(num_gateways: int):
    server = StreamServer(BusyEngine(), WINDOW_BYTES)
    host, number = await server.listen("127.0.0.1")
    metadata = {"host": host, "port": number, "secret": server.secret}
    gateways = [Gateway() for _ in range(num_gateways)]
    clients = [await StreamClient.connect("r0", metadata, each) for each in gateways]
    for gateway in gateways:
        await gateway.until(lambda gateway=gateway: gateway.snapshots)
    try:
        yield server, clients, gateways
    finally:
        for client in clients:
            client.close()
        server.close()


async def test_it_is_not_begun_and_the_snapshot_before_says_so():
    async with connected(2) as (server, clients, gateways):
        clients[0].post(submit(7, OF_OTHERS - 1))
        await gateways[0].until(lambda: gateways[0].frames)
        assert gateways[0].frames == [Busy(7)]
        assert gateways[0].snapshot_before.last_booking == 7
        assert gateways[0].snapshot_before.num_inflight_reqs == 0
        assert (server.engine.num_started, server.num_streams) == (0, 0)
        # The next one it has to take.
        clients[0].post(submit(8, 0))
        await gateways[0].until(gateways[0].ends)
        assert [each.stream for each in gateways[0].ends()] == [8]
        assert gateways[1].frames == []


async def test_what_its_gateway_knew_of_is_begun():
    async with connected(2) as (_, clients, gateways):
        clients[0].post(submit(1, OF_OTHERS))
        await gateways[0].until(gateways[0].ends)
        assert Busy(1) not in gateways[0].frames


async def test_of_one_gateway_everything_is_taken():
    async with connected(1) as (_, clients, gateways):
        clients[0].post(submit(1, 1))
        await gateways[0].until(gateways[0].ends)
        assert isinstance(gateways[0].frames[-1], End)


async def test_the_other_gateway_hears_of_a_request_before_the_next_snapshot_is_due(monkeypatch):
    """Snapshots of steps come never here: only what is told of bookings does."""
    monkeypatch.setattr("serving.stream.server.SNAPSHOT_INTERVAL_S", 3600.0)
    async with connected(2) as (server, clients, gateways):
        server.engine.gate.clear()
        clients[0].post(submit(1, 0))
        await gateways[1].until(lambda: gateways[1].snapshots[-1].num_inflight_reqs == 1)
        clients[0].post(submit(2, 0))
        await gateways[1].until(lambda: gateways[1].snapshots[-1].num_inflight_reqs == 2)
        server.engine.gate.set()
        await asyncio.sleep(0)
