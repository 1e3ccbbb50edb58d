"""Keep track of every process that a launch starts, and end what outlives it.

Ray's processes, its workers, vLLM's engine cores and HAProxy are children of
children, and some detach. On Linux the launcher becomes their subreaper: an
orphan among them is handed to it instead of to init, so that none escapes.
"""

import contextlib
import ctypes
import sys
from collections.abc import Iterator

import psutil

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_TERMINATE_S = 3.0  # from SIGTERM to SIGKILL


def become_subreaper() -> None:
    """Adopt orphaned descendants from now on; only Linux has that."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants() -> list[psutil.Process]:
    """Return all living descendants of this process; dead ones are reaped on the way."""
    return [process for process in psutil.Process().children(recursive=True) if not _dead(process)]


def _dead(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error, ChildProcessError):
        if process.status() != psutil.STATUS_ZOMBIE:
            return False
        process.wait(0)  # ours to reap if it was handed to us
    return True


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """End all processes that the block started and left running, in whatever way it ends."""
    before = {process.pid for process in descendants()}
    try:
        yield
    finally:
        left = [process for process in descendants() if process.pid not in before]
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        psutil.wait_procs(left, timeout=_TERMINATE_S)
        # Killing a parent may bring up children that appeared meanwhile: look again.
        while left := [process for process in descendants() if process.pid not in before]:
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(left, timeout=_TERMINATE_S)
