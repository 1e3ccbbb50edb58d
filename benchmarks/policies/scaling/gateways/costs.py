"""What does an engine cost a gateway? Memory, and the time of a snapshot that has come. Measured.

    python -m benchmarks.policies.scaling.gateways.costs

From the bytes of a message on: decoded, and taken in by the router. What the kernel and the event
loop add is not in it. Prefix caches are empty: they are what their engines hold, 8 bytes and a
Python integer a block.
"""

import asyncio
import statistics
import time
import tracemalloc

import msgspec

from router import EngineInfo, EngineSnapshot, Router, RouterSettings
from serving.core_form import form
from serving.stream.client import Connection, StreamClient
from serving.stream.frames import Snapshot, encode

_NUM_ROUNDS = 7
_STATE = EngineSnapshot(
    seq=0,
    num_running_reqs=64,
    num_inflight_reqs=64,
    num_free_kv_tokens=300_000,
    num_decoding_reqs=64,
    num_decode_context_tokens=100_000,
    step_s=0.012,
    step_num_decode_reqs=64,
)


class _Events:
    """Tells the router of snapshots, as `serving.gateway.engines.Engines` does."""

    def __init__(self, router: Router) -> None:
        self._router = router

    def on_received(self, client: Connection) -> None: ...

    def on_all_told(self, client: Connection) -> None: ...

    def on_snapshot(self, client: Connection, snapshot: EngineSnapshot) -> None:
        self._router.on_snapshot(client.replica_id, snapshot, time.monotonic())


async def _measure(num_engines: int) -> tuple[float, float]:
    """Return the bytes that an engine takes in the router, and µs per snapshot received."""
    info = EngineInfo(
        model="m",
        tasks=("generate",),
        max_model_len=32_768,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        num_kv_tokens=400_000,
        block_size=16,
    )
    tracemalloc.start()
    router = Router(RouterSettings())
    before = tracemalloc.get_traced_memory()[0]
    for engine in range(num_engines):
        router.on_replica_up(str(engine), info, 0.0)
    num_bytes = (tracemalloc.get_traced_memory()[0] - before) / num_engines
    tracemalloc.stop()
    events = _Events(router)
    clients = [StreamClient(str(each), "", events) for each in range(num_engines)]  # type: ignore[arg-type]
    rounds_us = []
    for number in range(1, _NUM_ROUNDS + 1):
        state = msgspec.structs.replace(_STATE, seq=number, num_steps_total=number)
        message = encode([Snapshot(state)])
        began_s = time.process_time()
        for client in clients:
            client.data_received(message)
        rounds_us.append(1e6 * (time.process_time() - began_s) / num_engines)
    return num_bytes, statistics.median(rounds_us)


def main() -> None:
    print(f"core {form()}; engines, bytes in the router per engine, µs per snapshot")
    for num_engines in (8, 64, 512, 2048):
        num_bytes, snapshot_us = asyncio.run(_measure(num_engines))
        print(f"{num_engines:5} {num_bytes:8.0f} {snapshot_us:6.1f}")


if __name__ == "__main__":
    main()
