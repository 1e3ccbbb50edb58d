"""Did breakers probe as they should, and how long did faults hold replies up?"""

import itertools
from collections.abc import Iterable

from benchmarks.chaos.client import Reply
from router.resilience.breaker import BreakerEvent


def check_probes(events: Iterable[BreakerEvent]) -> tuple[int, list[str]]:
    """Return how often a half-open breaker was probed, and what was wrong with the probes.

    A half-open breaker must see exactly one probe before it closes.
    """
    num_half_open = 0
    wrong = []
    for name, own in itertools.groupby(
        sorted(events, key=lambda event: (event.breaker, event.at_s)),
        key=lambda event: event.breaker,
    ):
        num_probes: int | None = None
        for event in own:
            if event.event == "half_open":
                num_probes = 0
            elif event.event == "probe":
                if num_probes is None:
                    wrong.append(f"{name}: a probe while not half-open")
                else:
                    num_probes += 1
            elif num_probes is not None:
                # It may open again without a probe: its process is still stopped.
                if num_probes > 1 or (num_probes == 0 and event.event == "closed"):
                    wrong.append(f"{name}: {num_probes} probes before it was {event.event}")
                num_half_open += num_probes
                num_probes = None
    return num_half_open, wrong


def splice_gaps_s(replies: list[Reply], fault_times_s: list[float], within_s: float) -> list[float]:
    """Return the pauses that faults caused in replies, beyond the usual pause, seconds, sorted.

    Of each reply the longest pause counts if it begins from one second before a fault to
    `within_s` after it, and is at least five times the reply's median gap between chunks.
    """
    found = []
    for reply in replies:
        gaps = sorted(
            (after - before, before) for before, after in itertools.pairwise(reply.times_s)
        )
        if not gaps:
            continue
        usual_s = gaps[len(gaps) // 2][0]
        gap_s, since_s = gaps[-1]
        near = any(fault_s - 1.0 <= since_s <= fault_s + within_s for fault_s in fault_times_s)
        if near and gap_s >= 5 * usual_s:
            found.append(gap_s - usual_s)
    return sorted(found)
