"""What signals do to a launch."""

import os
import signal
import subprocess
from collections.abc import Iterator

import psutil
import pytest

from serving.cli import interrupts
from serving.cli.interrupts import Interrupts, StopSignal
from serving.cluster.processes import deaf_to_stop_signals, pending_stop_signal


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


@pytest.fixture
def ignored_hangup() -> Iterator[None]:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, before)


def test_under_nohup_a_lost_terminal_stops_nothing(
    ignored_hangup: None, clock: list[float]
) -> None:
    with deaf_to_stop_signals():
        deaf = subprocess.Popen(["sleep", "1000"])
    with Interrupts() as stops:
        os.kill(os.getpid(), signal.SIGHUP)
        deaf.send_signal(signal.SIGHUP)
        assert pending_stop_signal(psutil.Process(deaf.pid)) is None
        with pytest.raises(StopSignal):
            os.kill(os.getpid(), signal.SIGTERM)
        assert not stops.must_hurry
        deaf.send_signal(signal.SIGTERM)
        assert pending_stop_signal(psutil.Process(deaf.pid)) == signal.SIGTERM
    deaf.kill()
    deaf.wait()
