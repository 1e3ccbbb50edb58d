"""How are traces of coding agents read? Prompts that grow turn by turn, with recorded times."""

import random
from collections.abc import Iterator
from typing import Any

from router.simulation.workload.workload import Arrival

KEYS = {"requests", "block_size"}

# Sessions were recorded separately. Here they begin this far apart on average; the time scale
# then brings the workload to the wanted load.
_SESSION_GAP_S = 60.0
_NUMBER_BITS = 24  # of a block within its session


def arrivals(rows: list[dict[str, Any]], seed: int) -> Iterator[Arrival]:
    """Yield the turns of all sessions, each at its recorded time after its session's start.

    Sessions start as a Poisson process. Block ids are run-length coded and valid within one
    session. Turns without a reply are left out.
    """
    rng = random.Random(f"sessions {seed}")
    start_s = 0.0
    for number, session in enumerate(rows):
        start_s += rng.expovariate(1.0 / _SESSION_GAP_S)
        turns = [turn for turn in session["requests"] if _size(turn, "in") and _size(turn, "out")]
        known_ids = [number << _NUMBER_BITS]
        ids = [_ids(turn, known_ids) for turn in turns]
        size = int(session["block_size"])
        num_said_tokens = num_heard_tokens = 0  # with which a turn's prompt begins
        for index, turn in enumerate(turns):
            num_prompt_tokens, num_output_tokens = _size(turn, "in"), _size(turn, "out")
            known = ids[index]
            said = (num_said_tokens, num_heard_tokens)
            num_said_tokens = num_heard_tokens = 0
            if index + 1 < len(turns):
                num_tokens = num_prompt_tokens + num_output_tokens
                following = ids[index + 1]
                # A reply has no ids, but in the prompt that goes on from it.
                if following[: len(known)] == known and _size(turns[index + 1], "in") >= num_tokens:
                    known = following[: num_tokens // size]
                    num_said_tokens, num_heard_tokens = num_prompt_tokens, num_tokens
            yield Arrival(
                offset_s=start_s + float(turn["t"]),
                num_prompt_tokens=num_prompt_tokens,
                num_output_tokens=num_output_tokens,
                session=str(session.get("id", number)),
                prefix_ids=known,
                prefix_block_tokens=size,
                num_said_tokens=said[0],
                num_heard_tokens=said[1],
            )


def _size(turn: dict[str, Any], key: str) -> int:
    """Return the tokens of a turn's prompt or reply; 0 if it has none."""
    return max(0, int(turn.get(key, 0)))


def _ids(turn: dict[str, Any], known: list[int]) -> tuple[int, ...]:
    """Return the ids of a prompt's whole blocks; `known` has those of its session by number.

    The same objects in every turn, or a long session would take gigabytes. Raises `ValueError` for
    a number that no session has.
    """
    ids: list[int] = []
    for first, length in turn.get("h", ()):
        end = first + length
        if not 0 <= first <= end < 1 << _NUMBER_BITS:
            raise ValueError(f"block {end} of a session")
        known.extend(known[0] | number for number in range(len(known), end))
        ids += known[first:end]
    return tuple(ids)
