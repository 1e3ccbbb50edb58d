"""A wheel, built from a copy of what it is made from."""

import os
import subprocess
import sys
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

from tests.deploy.compiled_core import ROOT


def copy_checkout(folder: Path) -> Path:
    """Copy what a wheel is made from into a new folder, and return that."""
    unwanted = ignore_patterns("__pycache__", "locks")
    for name in ("router", "serving", "benchmarks", "deploy"):  # the third is not for a wheel
        copytree(ROOT / name, folder / name, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        copy(ROOT / name, folder)
    return folder


def build_wheel(checkout: Path, **variables: str) -> tuple[Path, str]:
    """Build a wheel; return it, and what was said."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps"),
            *("-w", str(checkout / "dist"), str(checkout)),
        ],
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    (made,) = (checkout / "dist").glob("*.whl")
    return made, done.stdout
