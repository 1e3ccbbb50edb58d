"""How many requests per second do running engines carry?

Measured, by sending to a deployment. `serving.capacity.sweep.simulated_capacity` answers the same
question for modelled engines, in virtual time and without a deployment: `headway whatif` and the
simulated benchmarks have nothing to send to.
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

# Enough to fill two engines on CPU cores. The more an engine batches, the more it carries: 16
# would not fill them.
NUM_WORKERS = 48
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
    """Return the requests per second that the engines complete of this mix while they are full.

    `num_workers` users each send the next request when the last has ended; completions are
    counted for `window_s` seconds. Leaves the service idle, under `policy`. Raises `MeasureError`
    if a request fails.
    """
    await service.switch(policy)
    salt = f"{seed} capacity"
    requests = (mix.api_request(request, model, salt) for request in mix.requests(salt))
    async with Client(service.urls) as client:
        await client.connect(num_workers)
        loop = ClosedLoop(client, requests, num_workers)
        await loop.start(ramp_s=_RAMP_S)
        # All users begin with a prompt. Until as many requests have ended, the engines prefill
        # and do little else.
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
    """Return how many requests were served between two times; those on the edges count in part.

    Counting ends alone would not do: they come in bursts, and one burst more or less in the
    window is noise of ten percent.
    """
    return sum(
        max(0.0, min(end_s, record.last_s) - max(start_s, record.sent_s))
        / (record.last_s - record.sent_s)
        for record in records
    )
