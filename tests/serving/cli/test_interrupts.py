"""What signals do to a launch."""

import os
import signal

import pytest

from serving.cli import interrupts
from serving.cli.interrupts import Interrupts, StopSignal


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: now[0])
    return now


def test_the_first_raises_and_the_second_hurries(clock: list[float]) -> None:
    with Interrupts() as stops:
        with pytest.raises(StopSignal) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.value.signum == signal.SIGTERM
        clock[0] += 1.0
        os.kill(os.getpid(), signal.SIGINT)
        assert stops.must_hurry


def test_the_same_one_sent_twice_is_one(clock: list[float]) -> None:
    """As `timeout` sends it: to its child, and to the group that the child is in."""
    with Interrupts() as stops:
        with pytest.raises(StopSignal):
            os.kill(os.getpid(), signal.SIGTERM)
        clock[0] += 0.4
        os.kill(os.getpid(), signal.SIGTERM)
        assert not stops.must_hurry


def test_after_another_reason_to_end_the_first_hurries(clock: list[float]) -> None:
    with Interrupts() as stops:
        stops.stop_raising()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stops.must_hurry
