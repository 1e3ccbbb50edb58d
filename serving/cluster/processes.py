"""Which processes belong to a run, and how do all of them end?

Ray's processes, its workers, vLLM's engine cores and HAProxy are children of children; some detach,
and any of them may outlive the launcher. All have inherited a mark in their environment: the
run's folder. A process that has overwritten its environment with its title still writes
to a log in that folder.

No signal that asks to stop reaches them (`deaf_to_stop_signals`), whoever sends it to a
terminal, a process group or a cgroup: the launcher alone decides how a run ends.
"""

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil

RUN_VARIABLE = "HEADWAY_RUN"  # of the environment; its value is the run's folder
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
RAY_HEADS = ("gcs_server", "raylet")  # without one of them there is no Ray

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_GATEWAY_TITLE = ("ray::ServeReplica:", ":Gateway")  # beginning and part of it
_TRACKER = "multiprocessing.resource_tracker"
_STREAMS_S = 3.0  # for gateways to end their streams once Ray is gone
_TRACKERS_S = 1.0  # for shared memory to be unlinked once nobody uses it
_GIVE_UP_S = 10.0  # a process that the kernel cannot end by then is left


def run_processes(folder: Path) -> list[psutil.Process]:
    """Return all living processes of the run in `folder`, but for the launcher."""
    return [process for process in psutil.process_iter() if _is_of_run(process, str(folder))]


def _is_of_run(process: psutil.Process, folder: str) -> bool:
    with contextlib.suppress(psutil.Error, OSError):
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        if process.environ().get(RUN_VARIABLE) == folder:
            return process.pid != os.getpid()
        outputs = (os.readlink(f"/proc/{process.pid}/fd/{number}") for number in (1, 2))
        return any(output.startswith(f"{folder}/") for output in outputs)
    return False


def end_run(folder: Path) -> None:
    """End all processes of the run in `folder`, within seconds and whatever state they are in.

    Ray goes first: gateways notice, and end their streams with an error event. The
    processes that unlink shared memory and semaphores go last, by themselves.
    """
    processes = run_processes(folder)
    end_processes(process for process in processes if _title(process)[0] in RAY_HEADS)
    psutil.wait_procs(filter(_is_gateway, processes), timeout=_STREAMS_S)
    deadline_s = time.monotonic() + _GIVE_UP_S
    while left := [each for each in run_processes(folder) if _TRACKER not in _title(each)[1]]:
        if time.monotonic() > deadline_s:
            break
        end_processes(left)
        psutil.wait_procs(left, timeout=0.5)
    trackers = run_processes(folder)
    psutil.wait_procs(trackers, timeout=_TRACKERS_S)
    end_processes(trackers)


def end_processes(processes: Iterable[psutil.Process]) -> None:
    """Kill them; those that have ended do not matter."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _title(process: psutil.Process) -> tuple[str, str]:
    """Return name and command line of a process; empty if it has ended."""
    with contextlib.suppress(psutil.Error):
        return process.name(), " ".join(process.cmdline())
    return "", ""


def _is_gateway(process: psutil.Process) -> bool:
    beginning, part = _GATEWAY_TITLE
    title = _title(process)[1]
    return title.startswith(beginning) and part in title


@contextlib.contextmanager
def deaf_to_stop_signals() -> Iterator[None]:
    """Start processes in the block that stop signals do not reach, nor their children.

    They inherit the mask of blocked signals. This process keeps handling them: a thread
    that was there before takes them meanwhile. Call it from the main thread.
    """
    is_over = threading.Event()
    listener = threading.Thread(target=is_over.wait, name="signals", daemon=True)
    listener.start()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        is_over.set()


def adopt_orphans() -> None:
    """Become the parent of descendants that lose theirs: else they are left to init as zombies.

    The kernel gives them to us from now on; nothing happens except on Linux.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap_children() -> None:
    """Let go of the children, by birth or adoption, that have ended."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error, ChildProcessError):
            if child.status() == psutil.STATUS_ZOMBIE:
                child.wait(0)


def pending_stop_signal(process: psutil.Process) -> int | None:
    """Return a stop signal that was sent to a process that is deaf to it; None if there is none.

    One that this process ignores, as under `nohup`, does not count.
    """
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("ShdPnd:"):
                pending = int(line.split()[1], 16)
                return next((n for n in _heeded_signals() if pending >> (n - 1) & 1), None)
    return None


def _heeded_signals() -> list[signal.Signals]:
    return [each for each in STOP_SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]


def has_ended(process: psutil.Process) -> bool:
    """Whether the process is gone or a zombie."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    return True


def call_when_parent_ends(callback: Callable[[], object]) -> None:
    """Call `callback` in a thread of its own as soon as the process that started us ends."""
    parent = os.getppid()

    def wait() -> None:
        with contextlib.suppress(ProcessLookupError):
            poll = select.poll()
            poll.register(os.pidfd_open(parent), select.POLLIN)
            if os.getppid() == parent:  # else it has ended already, and its id may be another's
                poll.poll()
        callback()

    threading.Thread(target=wait, name="parent", daemon=True).start()


def prefer_for_oom_kill() -> None:
    """Have the kernel end this process and its children before all others when memory runs out."""
    with contextlib.suppress(OSError):  # a kernel without it, or a sandbox
        Path("/proc/self/oom_score_adj").write_text("1000")
