"""Where are all files of a run, and who removes them?"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from serving.cluster.processes import end_run
from serving.cluster.run.supervisor import Supervisor, remove_folder

_PREFIX = "headway-"
_OWNER_FILE = "owner"  # holds pid and start time of the launcher
# HAProxy allows its sockets 97 characters; Ray Serve puts a folder of 56 in between.
_MAX_FOLDER_LENGTH = 97 - len("/proxy/") - 56 - len("/metrics.sock")


@contextlib.contextmanager
def run_folder() -> Iterator[Path]:
    """Yield a new private folder. Afterwards, or when this process is killed, it is removed.

    A supervisor sees to the latter, and ends the run's processes then. First what
    is left of runs whose launcher and supervisor were both killed is ended and removed.
    """
    base = Path(tempfile.gettempdir())
    if len(str(base / _PREFIX)) + 8 > _MAX_FOLDER_LENGTH:  # mkdtemp adds eight characters
        base = Path("/tmp")
    for folder in base.glob(f"{_PREFIX}*"):
        if _is_abandoned(folder):
            end_run(folder)
            remove_folder(folder)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
    (folder / _OWNER_FILE).write_text(f"{os.getpid()} {psutil.Process().create_time()}")
    for name in ("proxy", "tmp"):
        (folder / name).mkdir()
    with Supervisor(folder):
        try:
            yield folder
        finally:
            remove_folder(folder)


def _is_abandoned(folder: Path) -> bool:
    """Whether the launcher that made `folder` has ended."""
    try:
        pid, started = (folder / _OWNER_FILE).read_text().split()
        owner = psutil.Process(int(pid))
        return owner.create_time() != float(started) or owner.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except (OSError, ValueError, psutil.Error):
        return False  # of another user, or being made right now
