"""Which processes did a launch start, and how are those ended that outlive it?

Ray's processes, its workers, vLLM's engine cores and HAProxy are children of
children, and some detach. On Linux the launcher becomes their subreaper: the kernel
gives it their orphans instead of giving them to init, so none escapes.
"""

import contextlib
import ctypes
import sys
from collections.abc import Iterator

import psutil

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_TERMINATE_S = 3.0  # from SIGTERM to SIGKILL


def become_subreaper() -> None:
    """Adopt orphaned descendants from now on; does nothing except on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants() -> list[psutil.Process]:
    """Return all living descendants of this process; reap the dead ones."""
    children = psutil.Process().children(recursive=True)
    return [process for process in children if not _reap_if_dead(process)]


def _reap_if_dead(process: psutil.Process) -> bool:
    """Reap the process if it is dead. Return whether it is."""
    with contextlib.suppress(psutil.Error, ChildProcessError):
        if process.status() != psutil.STATUS_ZOMBIE:
            return False
        process.wait(0)  # works only where it is our own child, by birth or adoption
    return True


@contextlib.contextmanager
def ending_new_processes() -> Iterator[None]:
    """End all processes that the block started and left running, however the block ends."""
    before = {process.pid for process in descendants()}
    try:
        yield
    finally:
        left = [process for process in descendants() if process.pid not in before]
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        psutil.wait_procs(left, timeout=_TERMINATE_S)
        # A process may have started others before it ended: look again.
        while left := [process for process in descendants() if process.pid not in before]:
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(left, timeout=_TERMINATE_S)
