"""How are Mooncake's traces read? Real traffic of Kimi, with the prefixes that requests share."""

import itertools
import random
from bisect import bisect_right
from collections.abc import Iterator
from statistics import median
from typing import Any

from router.simulation.workload.workload import Arrival

KEYS = {"timestamp", "input_length", "output_length", "hash_ids"}

# `hash_ids` name blocks of so many tokens, each with all blocks before it.
_BLOCK_TOKENS = 512
# From this gap on, different times are ticks of a clock and not times of arrival.
_TICK_MS = 1000.0


def arrivals(rows: list[dict[str, Any]], seed: int) -> Iterator[Arrival]:
    """Yield the requests, each at a uniformly drawn time within its tick.

    The conversation trace's clock ticks every 3 s; replayed as recorded, ten requests
    would arrive at once and none for 3 s. Spread over the tick, gaps are about Poisson's.
    """
    rng = random.Random(f"ticks {seed}")
    times_ms = sorted({float(row["timestamp"]) for row in rows})
    gaps_ms = [after - before for before, after in itertools.pairwise(times_ms)]
    tick_ms = median(gaps_ms) if gaps_ms else 0.0
    for row in rows:
        time_ms = float(row["timestamp"])
        if tick_ms >= _TICK_MS:
            index = bisect_right(times_ms, time_ms)
            end_ms = times_ms[index] if index < len(times_ms) else time_ms + tick_ms
            time_ms += rng.uniform(0.0, min(tick_ms, end_ms - time_ms))
        yield Arrival(
            offset_s=time_ms / 1e3,
            num_prompt_tokens=max(1, int(row["input_length"])),
            num_output_tokens=max(1, int(row["output_length"])),
            # Whole blocks only: the last id may name part of a block.
            prefix_ids=tuple(row["hash_ids"][: int(row["input_length"]) // _BLOCK_TOKENS]),
            prefix_block_tokens=_BLOCK_TOKENS,
        )
