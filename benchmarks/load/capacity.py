"""How many requests per second do engines carry?

Measured: of a deployment that runs, by sending. `serving.capacity.sweep.capacity` answers the
same for modelled engines, in virtual time and without a deployment.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence

from benchmarks.load.loops import ClosedLoop
from benchmarks.load.mix import Mix
from router.simulation.variant import SATURATING_POLICY
from serving.capacity.client import Client, Record
from serving.capacity.launch import MeasureError
from serving.capacity.service import Service

_RAMP_S = 2.0
_TIMEOUT_S = 120.0


async def measured_capacity(
    service: Service,
    mix: Mix,
    model: str,
    seed: int,
    num_workers: int,
    window_s: float,
    policy: str = SATURATING_POLICY,
) -> float:
    """Return the requests per second that the engines carry of this mix, kept full.

    By `num_workers` users who each send the next request when the last has ended; counted for
    `window_s` seconds. Leaves the service idle, under `policy`. Raises `MeasureError` if a
    request fails.
    """
    await service.switch(policy)
    salt = f"{seed} capacity"
    calls = (mix.call(ask, model, salt) for ask in mix.asks(salt))
    async with Client(service.urls) as client:
        await client.connect(num_workers)
        loop = ClosedLoop(client, calls, num_workers)
        await loop.start(ramp_s=_RAMP_S)
        # The users start with all their prompts at once: until as many requests have
        # ended, the engines prefill and little else.
        deadline_s = time.perf_counter() + _TIMEOUT_S
        while client.num_ended < num_workers and time.perf_counter() < deadline_s:
            await asyncio.sleep(0.1)
        start_s = time.perf_counter()
        await asyncio.sleep(window_s)
        end_s = time.perf_counter()
        records = await loop.stop(_TIMEOUT_S)
    failed = Counter(record.error for record in records if not record.completed)
    if failed:
        raise MeasureError(f"requests failed while the capacity was measured: {failed}")
    await service.wait_until_idle()
    return num_served(records, start_s, end_s) / (end_s - start_s)


def num_served(records: Sequence[Record], start_s: float, end_s: float) -> float:
    """Return how many requests were served between two times, those on its edges in part.

    Ends alone come in bursts, and a burst more or less in the window is noise
    of ten percent.
    """
    return sum(
        max(0.0, min(end_s, record.last_s) - max(start_s, record.sent_s))
        / (record.last_s - record.sent_s)
        for record in records
    )
