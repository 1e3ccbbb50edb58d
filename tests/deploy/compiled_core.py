"""The core, compiled for a test: needs a C compiler, and minutes where that was not done before."""

import subprocess
import sys
from pathlib import Path
from shutil import which

import pytest

ROOT = Path(__file__).resolve().parents[2]
needs_compiler = pytest.mark.skipif(which("cc") is None, reason="there is no C compiler")


def compile_core() -> None:
    """Compile this checkout's core unless that is done."""
    done = subprocess.run(
        [sys.executable, "deploy/compile.py"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert (done.returncode, "plain Python" in done.stderr) == (0, False), done.stderr
