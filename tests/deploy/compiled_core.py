"""The core, compiled for a test: needs a C compiler, and minutes where that was not done before."""

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from shutil import which

import pytest

ROOT = Path(__file__).resolve().parents[2]
needs_compiler = pytest.mark.skipif(which("cc") is None, reason="there is no C compiler")

CORE_TESTS = ("tests/router", "tests/serving/gateway/seen")


def compile_core() -> None:
    """Compile this checkout's core unless that is done, or being done: then wait."""
    done = subprocess.run(
        [sys.executable, "deploy/compile.py"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert (done.returncode, "plain Python" in done.stderr) == (0, False), done.stderr


class CompiledRun:
    """The core's own tests with the compiled core, in a process beside the one that asks.

    They need one core of the machine for minutes, and no clock.
    """

    def __init__(self) -> None:
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115  as long as the process
        run_tests = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CORE_TESTS)
        self._process = subprocess.Popen(
            ["sh", "-c", '"$0" deploy/compile.py && exec "$@"', sys.executable, *run_tests],
            cwd=ROOT,
            env=os.environ | {"HEADWAY_CORE": "compiled", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )

    def wait(self) -> tuple[int, str]:
        """Return its exit status and the end of what it printed."""
        returncode = self._process.wait()
        self._output.seek(0)
        return returncode, self._output.read()[-20_000:]

    def stop(self) -> None:
        """End it, and what it started, wherever it is; nothing to do where it has ended."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, 9)
            self._process.wait()


@functools.cache
def compiled_run() -> CompiledRun:
    """Return the run of this process, started by the first who asks."""
    return CompiledRun()
