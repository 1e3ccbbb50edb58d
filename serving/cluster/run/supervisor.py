"""Who ends a run whose launcher cannot, because it was killed?

A process outside of Ray that does nothing until the launcher has ended, however that happened. It
is in a session of its own, is nobody's child and ignores what asks to stop: a signal to the
launcher's group, terminal, cgroup or descendants leaves it there to do its work.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

import serving

_END_TIMEOUT_S = 5.0  # it has nothing to do after a clean end


class Supervisor:
    """The launcher's side: while in the block, the run in `folder` is supervised.

    After the block the supervisor ends what is left of the run, removes `folder` and is gone.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Self:
        root = Path(serving.__file__).parents[1]  # where the packages are, installed or not
        path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
        # Its standard input ends when we do, its standard output when it does.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "serving.cluster.run.supervisor", str(self._folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            cwd="/",
            start_new_session=True,
        )
        self._process.wait()  # it has left a process behind that is not our child
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        select.select([self._process.stdout], [], [], _END_TIMEOUT_S)
        self._process.stdout.close()


def remove_folder(folder: Path) -> None:
    """Remove the folder, even if a process that was just killed is still writing to it.

    What is to be kept of it is copied first.
    """
    from serving.cluster.logs import keep_logs  # late, as below

    keep_logs(folder)
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def main() -> None:
    """Wait until the launcher has ended; then end what it has left."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    if os.fork():
        os._exit(0)  # so that who ends the launcher's descendants does not find us
    folder = Path(sys.argv[1])
    sys.stdin.buffer.read()
    # Late: until here it takes as little memory as Python does.
    from serving.cluster.processes import end_run

    with contextlib.suppress(Exception):  # nobody would read of it; the folder is removed anyhow
        end_run(folder)
    remove_folder(folder)


if __name__ == "__main__":
    main()
