"""What does a reply from the response cache cost?

    python -m benchmarks.overhead.response_cache

Four streams of requests at a low load share the machine. One goes straight to null engines (the
floor). Three go through one gateway with its cache on: hits, misses that are stored, and requests
that bypass the cache.
"""

import argparse
import asyncio
import itertools
import random
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.load.loops import open_loop, poisson_offsets_s
from benchmarks.overhead.phases import WARM_UP_S, chat
from benchmarks.report.report import Report, Spread, percentile
from benchmarks.report.runner import print_progress, run_to_the_end
from benchmarks.systems.system import Floor, NullHeadway
from router.simulation.figures import brief
from serving.capacity.client import ApiRequest, Client
from serving.capacity.launch import MeasureError
from serving.capacity.service import SystemUnderTest

NUM_ENGINES = 2
_RATE = 30.0  # requests per second of each way
_NUM_TOKENS = 20  # per reply
_WAYS = ("floor", "bypass", "miss", "hit")


class CachingHeadway(NullHeadway):
    """`headway serve` with null engines and the response cache on."""

    def config(self, port: int, gateway_port: int) -> dict[str, Any]:
        """Return the content of the config file."""
        config = super().config(port, gateway_port)
        config["applications"][0]["args"]["cache"] = {"enabled": True}
        return config


def requests_by_way() -> dict[str, Iterator[ApiRequest]]:
    """Return the requests of each way. They differ only in what the cache's key depends on."""
    request = partial(chat, _NUM_TOKENS, null_engine_step_ms=1.0)
    return {
        "floor": itertools.repeat(request()),
        "bypass": itertools.repeat(request()),
        "miss": (request(seed=seed) for seed in itertools.count()),
        "hit": itertools.repeat(request(temperature=0)),
    }


async def run(num_repeats: int, span_s: float, seed: int) -> Report:
    """Measure all four ways at once, `num_repeats` times. Return the report."""
    config = {
        "num_engines": NUM_ENGINES,
        "requests_per_s_of_each": _RATE,
        "num_tokens_per_reply": _NUM_TOKENS,
        "span_s": span_s,
        "num_repeats": num_repeats,
    }
    report = Report("cache", "measured", seed, config)
    ttft_ms: dict[str, dict[int, list[float]]] = {way: {50: [], 99: []} for way in _WAYS}
    requests = requests_by_way()
    async with CachingHeadway("own", NUM_ENGINES) as headway, Floor(NUM_ENGINES) as floor:
        for repeat in range(num_repeats):
            rng = random.Random(f"{seed}-{repeat}")
            measured = await asyncio.gather(
                *(
                    _send_and_time(
                        way, floor if way == "floor" else headway, requests[way], span_s, rng
                    )
                    for way in _WAYS
                )
            )
            for way, ttft_s in zip(_WAYS, measured, strict=True):
                for percent, values in ttft_ms[way].items():
                    values.append(percentile(ttft_s, percent) * 1e3)
                print_progress(f"{way:7} p50 {brief(ttft_ms[way][50][-1])} ms of {len(ttft_s)}")
    for percent in (50, 99):
        report.add_row(
            "Time to first token, ms",
            figure=f"p{percent}",
            **{way: Spread.of(ttft_ms[way][percent]) for way in _WAYS},
        )
        added = [
            hit - base
            for hit, base in zip(ttft_ms["hit"][percent], ttft_ms["floor"][percent], strict=True)
        ]
        report.add_row(
            "Time to first token, ms",
            figure=f"p{percent}, added to the floor",
            hit=Spread.of(added),
        )
    report.add_target("hit, TTFT p50, ms, all of it", Spread.of(ttft_ms["hit"][50]), "<= 2")
    report.add_target("hit, TTFT p99, ms, all of it", Spread.of(ttft_ms["hit"][99]), "<= 2")
    return report


async def _send_and_time(
    way: str,
    system: SystemUnderTest,
    requests: Iterator[ApiRequest],
    span_s: float,
    rng: random.Random,
) -> list[float]:
    """Send one way's requests. Return their times to first token, seconds."""
    offsets_s = poisson_offsets_s(_RATE, WARM_UP_S + span_s, rng)
    arrivals = [(offset_s, next(requests)) for offset_s in offsets_s]
    async with Client(system.urls) as client:
        await client.connect(8)
        start_s = time.perf_counter()
        records = await open_loop(client, arrivals)
    if failed := [record.error for record in records if not record.completed]:
        raise MeasureError(f"{way}: {len(failed)} of {len(records)} requests failed: {failed[0]}")
    return [record.ttft_s for record in records if record.due_s - start_s >= WARM_UP_S]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--span", type=float, default=10.0, help="seconds of each repeat")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    run_to_the_end(lambda: run(options.repeats, options.span, options.seed)).finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
