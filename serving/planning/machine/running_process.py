"""Whose output is read while it runs, and who ends it where its reader gives up?"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def running_process(
    command: list[str], env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Run `command` with its output to be read; kill it if the block raises."""
    with subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise
