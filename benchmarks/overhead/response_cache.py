"""What a reply from the response cache costs: `python -m benchmarks.overhead.response_cache`.

Requests at a low load, dealt at random to four ways that share the machine: straight to
an engine without a model (the floor), and through one gateway with its cache on: found in
it, kept anew, and passing it by.
"""

import argparse
import asyncio
import itertools
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from benchmarks.load.loops import open_loop
from benchmarks.report.report import Report, Spread, percentile
from benchmarks.report.runner import run_to_the_end
from benchmarks.systems.null_engine import MODEL
from benchmarks.systems.system import Floor, Headway
from router.simulation.figures import brief
from serving.capacity.client import Call, Client
from serving.capacity.launch import MeasureError

NUM_ENGINES = 2
_RATE = 30.0  # requests per second of each way
_WARM_UP_S = 1.0
_NUM_TOKENS = 20  # per reply
_PROMPT = "Tell me something about headway."
_WAYS = ("floor", "bypass", "miss", "hit")

console = Console(highlight=False)


class Cached(Headway):
    """`headway serve` with the response cache on."""

    def config(self, port: int, gateway_port: int) -> dict[str, Any]:
        """Return the content of the config file."""
        config = super().config(port, gateway_port)
        config["applications"][0]["args"]["cache"] = {"enabled": True}
        return config


def calls() -> dict[str, Iterator[Call]]:
    """Return the requests of each way: alike in all but what the cache goes by."""

    def chat(**extra: Any) -> Call:
        return Call.chat(MODEL, _PROMPT, _NUM_TOKENS, True, stand_in_step_ms=1.0, **extra)

    return {
        "floor": itertools.repeat(chat()),
        "bypass": itertools.repeat(chat()),
        "miss": (chat(seed=seed) for seed in itertools.count()),
        "hit": itertools.repeat(chat(temperature=0)),
    }


async def run(num_repeats: int, span_s: float, seed: int) -> Report:
    """Measure all four ways at once, so often; return the report."""
    config = {
        "num_engines": NUM_ENGINES,
        "requests_per_s_of_each": _RATE,
        "num_tokens_per_reply": _NUM_TOKENS,
        "span_s": span_s,
        "num_repeats": num_repeats,
    }
    report = Report("cache", "measured", seed, config)
    ttft_ms: dict[str, dict[int, list[float]]] = {way: {50: [], 99: []} for way in _WAYS}
    requests = calls()
    async with Cached("own", NUM_ENGINES) as subject, Floor(NUM_ENGINES) as floor:
        for repeat in range(num_repeats):
            rng = random.Random(f"{seed}-{repeat}")
            measured = await asyncio.gather(
                *(
                    _ttft_s(way, floor if way == "floor" else subject, requests[way], span_s, rng)
                    for way in _WAYS
                )
            )
            for way, ttft_s in zip(_WAYS, measured, strict=True):
                for percent, values in ttft_ms[way].items():
                    values.append(percentile(ttft_s, percent) * 1e3)
                console.print(f"{way:7} p50 {brief(ttft_ms[way][50][-1])} ms of {len(ttft_s)}")
    for percent in (50, 99):
        report.row(
            "Time to first token, ms",
            figure=f"p{percent}",
            **{way: Spread.of(ttft_ms[way][percent]) for way in _WAYS},
        )
        added = [
            hit - base
            for hit, base in zip(ttft_ms["hit"][percent], ttft_ms["floor"][percent], strict=True)
        ]
        report.row(
            "Time to first token, ms",
            figure=f"p{percent}, added to the floor",
            hit=Spread.of(added),
        )
    report.target("hit, TTFT p50, ms, all of it", Spread.of(ttft_ms["hit"][50]), "<= 2")
    report.target("hit, TTFT p99, ms, all of it", Spread.of(ttft_ms["hit"][99]), "<= 2")
    return report


async def _ttft_s(
    way: str, subject: Headway | Floor, requests: Iterator[Call], span_s: float, rng: random.Random
) -> list[float]:
    arrivals: list[tuple[float, Call]] = []
    offset_s = 0.0
    while (offset_s := offset_s + rng.expovariate(_RATE)) < _WARM_UP_S + span_s:
        arrivals.append((offset_s, next(requests)))
    async with Client(subject.urls) as client:
        await client.connect(8)
        start_s = time.perf_counter()
        records = await open_loop(client, arrivals)
    if failed := [record.error for record in records if not record.completed]:
        raise MeasureError(f"{way}: {len(failed)} of {len(records)} requests failed: {failed[0]}")
    return [record.ttft_s for record in records if record.due_s - start_s >= _WARM_UP_S]


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
