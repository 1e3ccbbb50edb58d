"""Load, open loop and closed loop.

Open loop: every request is sent when its time has come, whatever became of
those before it, on a new connection if none is free. A generator that waits
for replies hides the very delays it is to show (coordinated omission).
"""

import asyncio
import time
from collections.abc import Iterable, Iterator

from serving.capacity.client import Call, Client, Record

# A closed loop that meets a refusing server must not spin on it.
_PAUSE_AFTER_ERROR_S = 0.1


async def open_loop(
    client: Client, arrivals: Iterable[tuple[float, Call]], timeout_s: float = 60.0
) -> list[Record]:
    """Send each call at its time, in seconds from now; return the records when all ended.

    What has not ended `timeout_s` after the last arrival is aborted and says so.
    """
    records = []
    start_s = time.perf_counter()
    for offset_s, call in arrivals:
        if (wait_s := start_s + offset_s - time.perf_counter()) > 0:
            await asyncio.sleep(wait_s)
        record = client.send(call)
        record.due_s = start_s + offset_s
        records.append(record)
    await client.wait(timeout_s)
    return records


class ClosedLoop:
    """`num_workers` users, each of whom sends the next call when the last has ended."""

    def __init__(self, client: Client, calls: Iterator[Call], num_workers: int) -> None:
        self.records: list[Record] = []
        self._client = client
        self._calls = calls
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
            self._send()

    async def stop(self, timeout_s: float = 30.0) -> list[Record]:
        """Send no more; return all records when the open ones have ended."""
        self._running = False
        await self._client.wait(timeout_s)
        return self.records

    def _send(self) -> None:
        if self._running:
            self.records.append(self._client.send(next(self._calls), self._on_end))

    def _on_end(self, record: Record) -> None:
        if record.error:
            asyncio.get_running_loop().call_later(_PAUSE_AFTER_ERROR_S, self._send)
        else:
            self._send()
