"""How are recorded conversations read? Every turn's prompt has all that was said before."""

import random
from collections.abc import Iterator
from typing import Any

from router.simulation.workload.sessions import Turn, play
from router.simulation.workload.workload import Arrival

KEYS = {"conversations"}

_BYTES_PER_TOKEN = 4.0  # about, for English in a byte-pair vocabulary
_SESSION_GAP_S = 1.0
_HUMAN = ("human", "user")


def arrivals(rows: list[dict[str, Any]], seed: int) -> Iterator[Arrival]:
    """Yield the turns of all conversations, begun as a Poisson process.

    ShareGPT's layout: `conversations`, a list of `from` and `value`. It has no times; how long
    people think is drawn (`sessions.play`). Tokens are counted as a quarter of the bytes.
    """
    rng = random.Random(f"conversations {seed}")
    start_s = 0.0
    for number, row in enumerate(rows):
        start_s += rng.expovariate(1.0 / _SESSION_GAP_S)
        turns = []
        asked = 0
        for message in row["conversations"]:
            num_tokens = max(1, round(len(message["value"].encode()) / _BYTES_PER_TOKEN))
            if message["from"] in _HUMAN:
                asked += num_tokens
            elif asked:  # a reply; without a question it is no request
                turns.append(Turn(asked, num_tokens))
                asked = 0
        yield from play(turns, start_s, number, rng)
