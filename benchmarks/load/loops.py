"""When is the next request sent: at its time (open loop) or after a reply (closed loop)?

In an open loop every request is sent when it is due, whatever became of the earlier ones, on a
new connection if none is free. A generator that waits for replies hides the very delays that it
should show (coordinated omission).
"""

import asyncio
import random
import time
from collections.abc import Iterable, Iterator

from serving.capacity.client import ApiRequest, Client, Record

# A closed loop in front of a server that refuses must not spin.
_PAUSE_AFTER_ERROR_S = 0.1


def poisson_offsets_s(rate: float, duration_s: float, rng: random.Random) -> Iterator[float]:
    """Yield the times of a Poisson process of `rate` per second, seconds from its start.

    Draws one number from `rng` per time, when it is asked for.
    """
    offset_s = 0.0
    while (offset_s := offset_s + rng.expovariate(rate)) < duration_s:
        yield offset_s


async def open_loop(
    client: Client, arrivals: Iterable[tuple[float, ApiRequest]], timeout_s: float = 60.0
) -> list[Record]:
    """Send each request at its time, in seconds from now. Return the records when all ended.

    Requests that have not ended `timeout_s` after the last arrival are aborted; their records
    say so.
    """
    records = []
    start_s = time.perf_counter()
    for offset_s, request in arrivals:
        if (wait_s := start_s + offset_s - time.perf_counter()) > 0:
            await asyncio.sleep(wait_s)
        record = client.send(request)
        record.due_s = start_s + offset_s
        records.append(record)
    await client.wait(timeout_s)
    return records


class ClosedLoop:
    """`num_workers` users, each of whom sends the next request when the last has ended."""

    def __init__(self, client: Client, requests: Iterator[ApiRequest], num_workers: int) -> None:
        self.records: list[Record] = []
        self._client = client
        self._requests = requests
        self._num_workers = num_workers
        self._running = False

    async def start(self, ramp_s: float = 0.0) -> None:
        """Start the users, spread evenly over `ramp_s` so that they do not march in step."""
        self._running = True
        start_s = time.perf_counter()
        for number in range(self._num_workers):
            due_s = start_s + ramp_s * number / self._num_workers
            if (wait_s := due_s - time.perf_counter()) > 0:
                await asyncio.sleep(wait_s)
            self._send_next()

    async def stop(self, timeout_s: float = 30.0) -> list[Record]:
        """Send no more. Return all records when the open requests have ended."""
        self._running = False
        await self._client.wait(timeout_s)
        return self.records

    def _send_next(self) -> None:
        if self._running:
            self.records.append(self._client.send(next(self._requests), self._on_end))

    def _on_end(self, record: Record) -> None:
        if record.error:
            asyncio.get_running_loop().call_later(_PAUSE_AFTER_ERROR_S, self._send_next)
        else:
            self._send_next()
