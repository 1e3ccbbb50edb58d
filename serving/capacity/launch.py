"""Which processes has a command started, and how are all of them ended?

Ray detaches processes, renames them and starts new ones, so neither parents nor names find them
all. A mark in the environment of the first process is inherited by the others; where a renamed
process has overwritten its environment, its parent has the mark.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import psutil

from serving.cluster.processes import has_ended

_MARK = "HEADWAY_LAUNCH"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None)
_ROOT = Path(__file__).parents[2]  # where the packages are, installed or not


class MeasureError(Exception):
    """The system to measure did not start or does not answer. `log` is the end of its log."""

    def __init__(self, reason: str, log: str = "") -> None:
        super().__init__(reason)
        self.log = log


class Launch:
    """A command and all processes that it starts."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        """Start the command with its output in `log`. The kernel ends it if this process dies."""
        # All that were found so far, parents first.
        self.processes: dict[psutil.Process, None] = {}
        self._mark = uuid.uuid4().hex
        self._log = log
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        with log.open("wb") as output:
            self._first = subprocess.Popen(
                command,
                cwd=_ROOT,
                env={**os.environ, _MARK: self._mark, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),
                start_new_session=True,  # Ctrl-C is for this process, which ends the command
            )

    @property
    def pid(self) -> int:
        """The process id of the command itself."""
        return self._first.pid

    @property
    def returncode(self) -> int | None:
        """The exit status of the command itself, None while it runs."""
        return self._first.poll()

    def log_tail(self, num_bytes: int = 3000) -> str:
        """Return the end of its output."""
        return self._log.read_bytes()[-num_bytes:].decode(errors="replace")

    def refresh(self) -> None:
        """Find processes started since the last call; takes tens of milliseconds."""
        candidates = [each for each in psutil.process_iter() if each.pid != os.getpid()]
        num_before = -1
        # Anew until there is no more: a child may have a lower id than its parent.
        while len(self.processes) != num_before:
            num_before = len(self.processes)
            for process in candidates:
                with contextlib.suppress(psutil.Error):
                    if self._is_ours(process):
                        self.processes[process] = None

    def living(self) -> list[psutil.Process]:
        """Return the found processes that still run."""
        return [process for process in self.processes if not has_ended(process)]

    def end(self, patience_s: float = 40.0) -> list[str]:
        """Interrupt the command, wait, kill what is left; return the titles of those killed.

        Processes are identified by id and start time, so a reused id is safe.
        """
        self.refresh()
        if self._first.poll() is None:
            self._first.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._first.wait(patience_s)
        deadline_s = time.monotonic() + 3.0  # after a clean end the last ones are still exiting
        while self.living() and time.monotonic() < deadline_s:
            time.sleep(0.1)
        self.refresh()
        killed = []
        for process in self.living():
            with contextlib.suppress(psutil.Error):
                killed.append(" ".join(process.cmdline())[:120])
                process.kill()
        self._first.wait()
        return killed

    def _is_ours(self, process: psutil.Process) -> bool:
        if process in self.processes or process.pid == self._first.pid:
            return True
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_MARK) == self._mark:
                return True
        parent = process.parent()
        return parent is not None and parent in self.processes
