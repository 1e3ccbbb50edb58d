"""Ray is not waited for once it has ended, and not left in the middle of a call."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from serving.cli.interrupts import Interrupts, StopSignal
from serving.cluster.processes import deaf_to_stop_signals
from serving.cluster.ray_session import RaySession
from serving.gateway.http.endpoint import StartError


@pytest.fixture
def session() -> Iterator[RaySession]:
    """A private session whose heads are any two processes."""
    with deaf_to_stop_signals():
        heads = [psutil.Popen(["sleep", "1000"]) for _ in range(2)]
    yield RaySession(True, False, None, dict(zip(("gcs_server", "raylet"), heads, strict=True)))
    for head in heads:
        head.kill()
        head.wait()


def test_a_call_returns_and_raises_as_ever(session: RaySession) -> None:
    assert session.call(lambda: 7) == 7
    with pytest.raises(KeyError, match="8"):
        session.call(lambda: {}[8])


@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_no_call_outlasts_ray(session: RaySession, name: str) -> None:
    session.check()
    never = threading.Event()
    threading.Timer(0.3, session.heads[name].kill).start()
    began_s = time.monotonic()
    with pytest.raises(StartError, match=rf"^Ray has ended: its {name} \(process \d+\) is gone$"):
        session.call(never.wait)
    assert time.monotonic() - began_s < 2
    never.set()
    with pytest.raises(StartError):
        session.check()


def test_a_signal_waits_for_the_call_that_it_interrupts(session: RaySession) -> None:
    ended = threading.Event()

    def ask() -> None:
        time.sleep(0.6)
        ended.set()

    with Interrupts() as stops:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(StopSignal):
            session.call(ask)
        assert ended.is_set()
        assert not stops.must_hurry


def test_a_signal_to_ray_is_one_to_the_launcher(session: RaySession) -> None:
    assert session.stop_signal() is None
    session.heads["raylet"].send_signal(signal.SIGTERM)
    assert session.stop_signal() == signal.SIGTERM
    session.check()


def test_a_ray_of_somebody_else_is_called_as_it_is() -> None:
    session = RaySession(False, True, None)
    assert session.call(threading.get_ident) == threading.get_ident()
    session.check()
    assert session.stop_signal() is None
    assert session.logs is None
