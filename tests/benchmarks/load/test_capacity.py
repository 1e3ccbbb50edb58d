"""How is the capacity counted, on which every rate depends?"""

import pytest

from benchmarks.load.capacity import num_served
from serving.capacity.client import Record


def record(sent_s: float, last_s: float) -> Record:
    return Record(due_s=sent_s, sent_s=sent_s, last_s=last_s, completed=True)


def test_requests_on_the_edges_count_in_part() -> None:
    records = [record(0.0, 9.0), record(8.0, 12.0), record(12.0, 14.0), record(18.0, 22.0)]
    assert num_served([*records, record(21.0, 30.0)], 10.0, 20.0) == pytest.approx(0.5 + 1 + 0.5)


def test_bursts_of_ends_do_not_matter() -> None:
    """Sixteen users in step, a burst every 10 s: 1.6 requests/s wherever the window lies."""
    records = [record(10.0 * batch, 10.0 * batch + 10.0) for batch in range(6) for _ in range(16)]
    for start_s in (9.0, 11.0, 15.0):
        assert num_served(records, start_s, start_s + 18.0) / 18.0 == pytest.approx(1.6)
