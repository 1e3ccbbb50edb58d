"""The processes of one launch, by role: their CPU time, their memory and their end.

Ray detaches processes, renames them and starts new ones, so neither parents
nor names find them all. A mark in the environment of the first is inherited
by the rest; where a renamed process has overwritten its environment, its
parent bears the mark.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
import uuid
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import psutil

_MARK = "HEADWAY_BENCH_LAUNCH"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None)

# What stands in a process's title, and the role that it proves; the first match counts.
_ROLES = (
    ("ServeReplica:headway:Gateway", "gateway"),
    ("ServeReplica:headway:Engine", "engines"),
    ("benchmarks.systems.null_engine", "engines"),
    ("benchmarks.peers.emulated_server", "engines"),
    ("vllm_server", "engines"),
    ("VLLM::", "engines"),
    ("haproxy", "front"),
)
OTHER_ROLE = "ray"


def engine_core(actor: psutil.Process) -> psutil.Process:
    """Return the process in which vLLM computes, by the actor that started it.

    Its title says `EngineCore`, but `setproctitle` now and then finds no room for one.

    Raises `LookupError` or `psutil.Error` if one of them is gone.
    """
    for child in actor.children():
        with contextlib.suppress(psutil.Error):
            line = " ".join(child.cmdline())
            if "EngineCore" in line or "spawn_main" in line:
                return child
    raise LookupError(f"process {actor.pid} has no engine core")


class Launch:
    """One command and all that it starts."""

    def __init__(self, command: Sequence[str], log: Path, cwd: Path) -> None:
        """Start it; its output goes to `log`. It is told to end should we be killed."""
        self._mark = uuid.uuid4().hex
        self._log = log
        self._known: dict[psutil.Process, str] = {}
        path = os.pathsep.join(filter(None, (str(cwd), os.environ.get("PYTHONPATH"))))
        with log.open("wb") as output:
            self._first = subprocess.Popen(
                command,
                cwd=cwd,
                env={**os.environ, _MARK: self._mark, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),
                start_new_session=True,  # a Ctrl-C is for us; we end it in good order
            )

    @property
    def pid(self) -> int:
        """Of the command itself."""
        return self._first.pid

    @property
    def returncode(self) -> int | None:
        """Exit status of the command itself, `None` while it runs."""
        return self._first.poll()

    def log_tail(self, num_bytes: int = 3000) -> str:
        return self._log.read_bytes()[-num_bytes:].decode(errors="replace")

    def refresh(self) -> None:
        """Look for processes that have come; takes tens of milliseconds."""
        for process in psutil.process_iter():
            if process.pid != os.getpid():
                with contextlib.suppress(psutil.Error):
                    if self._is_ours(process):
                        # A worker gets its title after it has started.
                        self._known[process] = self._role(process)

    def titled(self, part: str) -> list[psutil.Process]:
        """Return the processes that live and have this in their title."""
        found = []
        for process in self._left():
            with contextlib.suppress(psutil.Error):
                if part in f"{process.name()} {' '.join(process.cmdline())}":
                    found.append(process)
        return found

    def cpu_s(self) -> defaultdict[str, float]:
        """Return CPU seconds used so far, by role; 0 of a role that there is not."""
        used: defaultdict[str, float] = defaultdict(float)
        for process, role in self._known.items():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                used[role] += times.user + times.system
        return used

    def rss_bytes(self, role: str) -> int:
        """Return the resident memory of all processes of a role, shared pages included."""
        total = 0
        for process, its_role in self._known.items():
            if its_role == role:
                with contextlib.suppress(psutil.Error):
                    total += process.memory_info().rss
        return total

    def end(self, patience_s: float = 40.0) -> list[str]:
        """Ask the command to end, wait, kill what is left; return the titles of those killed.

        A process is known by its start time too, so a number used anew is safe.
        """
        self.refresh()
        if self._first.poll() is None:
            self._first.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._first.wait(patience_s)
        deadline_s = time.monotonic() + 3.0  # the last ones of a clean end are still leaving
        while self._left() and time.monotonic() < deadline_s:
            time.sleep(0.1)
        self.refresh()
        killed = []
        for process in self._left():
            with contextlib.suppress(psutil.Error):
                killed.append(" ".join(process.cmdline())[:120])
                process.kill()
        self._first.wait()
        return killed

    def _role(self, process: psutil.Process) -> str:
        """By its title, or its parent's if that tells nothing: an engine core may have none."""
        title = f"{process.name()} {' '.join(process.cmdline())}"
        role = next((role for part, role in _ROLES if part in title), None)
        if role is None and (parent := process.parent()) is not None:
            role = self._known.get(parent)
        return role or OTHER_ROLE

    def _left(self) -> list[psutil.Process]:
        return [
            process
            for process in self._known
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        ]

    def _is_ours(self, process: psutil.Process) -> bool:
        if process in self._known or process.pid == self._first.pid:
            return True
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_MARK) == self._mark:
                return True
        parent = process.parent()
        return parent is not None and parent in self._known


def machine_busy_s() -> float:
    """Return the CPU seconds that all processes of the machine have used since boot."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq
