"""Does `make chaos-fleet` see what it is there to see? A small fleet, with and without a fault.

In virtual time, or a busy machine would be judged.
"""

import msgspec
import pytest

from benchmarks.chaos import emulated, in_process
from benchmarks.chaos.emulated import EmulatedFault, Scenario
from router.resilience.resume import Reply, Resume
from serving.config import parse
from serving.stream.frames import framed
from serving.stream.record import decode_groups
from tests.support import virtual_time

# Engines are lost often, and come back soon.
SCENARIO = Scenario(3, 120, 16, 0.15, seed=1, faults=(EmulatedFault.RESET,))


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults at short intervals, of which no request is suspected: each would be before long."""
    monkeypatch.setattr(in_process, "SLOWNESS", 1.0)
    monkeypatch.setattr(emulated, "_RESTART_S", (0.1, 0.3))
    trusting = {"router": {"refuse_s": 0.0}}
    monkeypatch.setattr(in_process, "parse", lambda config: parse({**config, **trusting}))


def replies() -> dict:
    """The figures of one run's replies."""
    report = virtual_time.run(emulated.run(SCENARIO))
    [row] = report.tables["replies"]
    assert row["sent"] == SCENARIO.num_requests
    assert row["retries_and_resumptions"] > 5
    return row


def test_replies_that_outlive_their_engines_are_the_same() -> None:
    row = replies()
    assert (row["failed"], row["different"]) == (0, 0)


@pytest.mark.parametrize("which", ["every id", "the last id"])
def test_a_record_of_wrong_tokens_is_seen(monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    """In the bytes that the client has, which are compared at the seam, or in those to come."""
    resume = Reply.resume

    def resume_wrongly(self: Reply) -> Resume | None:
        right = resume(self)
        if right is None or not right.record:
            return right
        groups = decode_groups(right.record)
        changed = groups if which == "every id" else groups[-1:]
        for group in changed:
            group[:] = [
                msgspec.structs.replace(entry, token_ids=tuple(id_ + 1 for id_ in entry.token_ids))
                for entry in group
            ]
        encoded = map(msgspec.msgpack.encode, groups)
        record = b"".join(map(framed, encoded))
        return msgspec.structs.replace(right, record=record)

    monkeypatch.setattr(Reply, "resume", resume_wrongly)
    row = replies()
    assert row["failed"] + row["different"] > 3
