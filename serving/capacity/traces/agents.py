"""How are traces of coding agents read? Prompts that grow turn by turn, with recorded times."""

import random
from collections.abc import Iterator
from typing import Any

from router.simulation.workload.workload import Arrival

KEYS = {"requests", "block_size"}

# Sessions were recorded separately. Here they begin this far apart on average; the time scale
# then brings the workload to the wanted load.
_SESSION_GAP_S = 60.0


def arrivals(rows: list[dict[str, Any]], seed: int) -> Iterator[Arrival]:
    """Yield the turns of all sessions, each at its recorded time after its session's start.

    Sessions start as a Poisson process. Block ids are run-length coded and valid within one
    session. Turns without a reply are left out.
    """
    rng = random.Random(f"sessions {seed}")
    start_s = 0.0
    for number, session in enumerate(rows):
        start_s += rng.expovariate(1.0 / _SESSION_GAP_S)
        for turn in session["requests"]:
            if turn.get("in", 0) <= 0 or turn.get("out", 0) <= 0:
                continue
            ids = (first + i for first, length in turn.get("h", ()) for i in range(length))
            yield Arrival(
                offset_s=start_s + float(turn["t"]),
                num_prompt_tokens=int(turn["in"]),
                num_output_tokens=int(turn["out"]),
                session=str(session.get("id", number)),
                prefix_ids=tuple(number << 24 | block for block in ids),
                prefix_block_tokens=int(session["block_size"]),
            )
