"""A run's folder and processes do not outlive its launcher, however that ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from serving.cluster.processes import has_ended
from serving.cluster.run.run_folder import run_folder

# As `launch`: the mark is set once there is a folder, and processes inherit it.
LAUNCHER = """
import os, subprocess, sys
from serving.cluster.processes import RUN_VARIABLE
from serving.cluster.run.run_folder import run_folder

with run_folder() as folder:
    os.environ[RUN_VARIABLE] = str(folder)
    sleep = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    print(folder, sleep.pid, flush=True)
    sys.stdin.readline()
    sleep.kill()
"""


class Launcher:
    def __init__(self) -> None:
        path = os.pathsep.join(sys.path)
        self.process = psutil.Popen(
            [sys.executable, "-c", LAUNCHER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        folder, pid = self.process.stdout.readline().split()
        self.folder = Path(folder)
        self.sleep = psutil.Process(int(pid))
        (self.supervisor,) = (
            each
            for each in psutil.process_iter()
            if each.pid != self.process.pid and folder in command(each)
        )

    @property
    def left(self) -> list[object]:
        processes = [each for each in (self.sleep, self.supervisor) if not has_ended(each)]
        return [*processes, *([self.folder] if self.folder.exists() else [])]

    def is_clean(self, timeout_s: float) -> bool:
        deadline_s = time.monotonic() + timeout_s
        while self.left and time.monotonic() < deadline_s:
            time.sleep(0.05)
        return not self.left


def command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture
def launcher() -> Iterator[Callable[[], Launcher]]:
    started = []

    def go() -> Launcher:
        started.append(Launcher())
        return started[-1]

    yield go
    for each in started:
        for process in (each.process, each.sleep, each.supervisor):
            if process.is_running():
                process.kill()
        each.process.stdin.close()
        each.process.stdout.close()
        each.process.wait()


def test_a_clean_end_leaves_nothing_to_supervise(launcher: Callable) -> None:
    run = launcher()
    run.process.stdin.write("\n")
    run.process.stdin.flush()
    assert run.process.wait(10) == 0
    assert run.is_clean(10)


def test_a_killed_launcher_is_cleaned_up_after(launcher: Callable) -> None:
    run = launcher()
    run.process.kill()
    assert run.is_clean(10)


def test_nothing_that_asks_to_stop_ends_the_supervisor(launcher: Callable) -> None:
    run = launcher()
    assert run.supervisor not in run.process.children(recursive=True)
    assert os.getsid(run.supervisor.pid) != os.getsid(run.process.pid)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        run.supervisor.send_signal(signum)
    time.sleep(0.2)
    assert run.supervisor.is_running()
    run.process.kill()
    assert run.is_clean(10)


def test_the_next_launch_cleans_up_where_both_were_killed(launcher: Callable) -> None:
    run = launcher()
    alive = launcher()
    run.supervisor.kill()
    run.process.kill()
    run.process.wait()
    assert run.sleep.is_running()
    with run_folder():
        assert run.is_clean(5)
        assert len(alive.left) == 3
