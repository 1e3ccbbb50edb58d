"""Processes of a run: found by their mark, deaf to what asks to stop, ended whatever they do."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from serving.cluster.processes import (
    RUN_VARIABLE,
    deaf_to_stop_signals,
    end_run,
    has_ended,
    pending_stop_signal,
    prefer_for_oom_kill,
    run_processes,
)

SLEEP = "import time; print('up', flush=True); time.sleep(1000)"
IGNORE = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "

Start = Callable[..., psutil.Popen]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start Python with these lines and the mark of the run in `tmp_path`; wait for a word."""
    started = []

    def go(lines: str, env: dict[str, str] | None = None, **options: object) -> psutil.Popen:
        process = psutil.Popen(
            [sys.executable, "-c", lines],
            env={RUN_VARIABLE: str(tmp_path)} if env is None else env,
            **{"stdout": subprocess.PIPE, **options},
        )
        started.append(process)
        if process.stdout:
            process.word = process.stdout.readline().decode().strip()
        return process

    yield go
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


class TestRun:
    def test_all_of_a_run_end_and_no_others(self, start: Start, tmp_path: Path) -> None:
        ours = [start(SLEEP), start(IGNORE + SLEEP, start_new_session=True)]
        stopped = start(SLEEP)
        stopped.send_signal(signal.SIGSTOP)
        other = start(SLEEP, env={RUN_VARIABLE: f"{tmp_path}-other"})
        assert {process.pid for process in run_processes(tmp_path)} == {
            process.pid for process in (*ours, stopped)
        }
        began_s = time.monotonic()
        end_run(tmp_path)
        assert time.monotonic() - began_s < 3
        assert [process.poll() is None for process in (*ours, stopped, other)] == [False] * 3 + [
            True
        ]

    def test_a_process_without_the_mark_is_known_by_its_log(
        self, start: Start, tmp_path: Path
    ) -> None:
        with (tmp_path / "log").open("wb") as log:
            process = start(SLEEP, env={}, stdout=log)
        assert [found.pid for found in run_processes(tmp_path)] == [process.pid]

    def test_shared_memory_goes_with_who_made_it(self, start: Start, tmp_path: Path) -> None:
        process = start(
            "from multiprocessing.shared_memory import SharedMemory\n"
            "memory = SharedMemory(create=True, size=4096); print(memory.name, flush=True)\n"
            "import time; time.sleep(1000)"
        )
        memory = Path("/dev/shm") / process.word
        assert memory.exists()
        until(lambda: len(run_processes(tmp_path)) == 2)  # with the one that unlinks it
        end_run(tmp_path)
        assert not memory.exists()
        assert run_processes(tmp_path) == []

    def test_an_ended_process_that_nobody_has_reaped_is_gone(
        self, start: Start, tmp_path: Path
    ) -> None:
        process = start("print('up')")
        found = psutil.Process(process.pid)
        until(lambda: has_ended(found))
        assert run_processes(tmp_path) == []


class TestStopSignals:
    @pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_a_deaf_process_stays_and_shows_what_it_was_sent(
        self, start: Start, signum: signal.Signals
    ) -> None:
        with deaf_to_stop_signals():
            process = start(SLEEP)
        assert pending_stop_signal(process) is None
        process.send_signal(signum)
        until(lambda: pending_stop_signal(process) == signum)
        with pytest.raises(subprocess.TimeoutExpired):
            subprocess.Popen.wait(process, 0.3)
        process.kill()
        process.wait()
        assert pending_stop_signal(process) is None

    def test_who_starts_them_hears_its_own_signals(self) -> None:
        heard: list[int] = []
        before = signal.signal(signal.SIGHUP, lambda signum, frame: heard.append(signum))
        try:
            with deaf_to_stop_signals():
                os.kill(os.getpid(), signal.SIGHUP)
                until(lambda: heard)
            os.kill(os.getpid(), signal.SIGHUP)
            until(lambda: len(heard) == 2)
        finally:
            signal.signal(signal.SIGHUP, before)
        assert signal.SIGHUP not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


PARENT = """
import subprocess, sys, time
child = '''
import pathlib, sys, time
from serving.cluster.processes import call_when_parent_ends
call_when_parent_ends(lambda: pathlib.Path(sys.argv[1]).write_text("ended"))
pathlib.Path(sys.argv[1] + ".up").touch()
time.sleep(20)
'''
subprocess.Popen([sys.executable, "-c", child, sys.argv[1]], stdout=subprocess.DEVNULL)
print("up", flush=True)
time.sleep(1000)
"""


def test_a_child_hears_of_its_parents_end(start: Start, tmp_path: Path) -> None:
    note = tmp_path / "note"
    env = {RUN_VARIABLE: str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = start(PARENT.replace("sys.argv[1]]", f"{str(note)!r}]"), env=env)
    until((tmp_path / "note.up").exists)
    time.sleep(0.2)
    assert not note.exists()
    parent.kill()
    parent.wait()
    until(note.exists, 2)
    end_run(tmp_path)


def test_a_preferred_victim_says_so_to_the_kernel() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(prefer_for_oom_kill)
        assert pool.apply(Path.read_text, (Path("/proc/self/oom_score_adj"),)) == "1000\n"
    with contextlib.suppress(OSError):
        assert Path("/proc/self/oom_score_adj").read_text() != "1000\n"


ADOPTS = """
import subprocess, sys, time
import psutil
from serving.cluster.processes import adopt_orphans, reap_children

adopt_orphans()
middle = "import subprocess; print(subprocess.Popen(['sleep', '1'], stdout=-3, stderr=-3).pid)"
orphan = int(subprocess.run([sys.executable, "-c", middle], capture_output=True).stdout)
reap_children()
print(psutil.Process(orphan).ppid() == psutil.Process().pid)
time.sleep(1.5)
print(psutil.Process(orphan).status())
reap_children()
print(psutil.pid_exists(orphan))
"""


def test_an_adopted_orphan_that_has_ended_is_let_go() -> None:
    env = {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", ADOPTS], env=env, capture_output=True, text=True)
    assert result.stdout.split() == ["True", "zombie", "False"], result.stderr
