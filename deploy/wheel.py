"""Puts the compiled core into a wheel where it can be compiled, and the samples of this folder.

See `cmdclass` in pyproject.toml. An editable install has neither: beside sources that change, both
would be old ones.
"""

import shutil
import sys
from functools import cache
from pathlib import Path

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent))

from compile import CannotCompile, find_or_compile, say

FOLDER = Path(__file__).resolve().parent
SAMPLES = Path("serving", "samples")  # there `serving.cli.samples` finds them


@cache
def core_for(commands: tuple[str, ...]) -> Path | None:
    """Return the folder with the compiled core; None where none is wanted or can be had."""
    if "bdist_wheel" not in commands:
        return None
    try:
        return find_or_compile()
    except CannotCompile as problem:
        say(f"{problem}: the wheel has the core as plain Python")
        return None


class CoreWheel(bdist_wheel):
    """Makes a wheel for this Python and machine if the core in it is."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if core_for(tuple(self.distribution.commands)) is not None:
            self.root_is_pure = False


class CoreBuild(build_py):
    """Copies the packages, and for a wheel the compiled core over the plain one."""

    def run(self) -> None:
        if not self.editable_mode:
            # A build before may have left other modules there, and they would be packed.
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        if not self.editable_mode:
            # What makes and pins an installation is no sample.
            unwanted = shutil.ignore_patterns("*.py", "locks", "__pycache__")
            shutil.copytree(FOLDER, Path(self.build_lib, SAMPLES), ignore=unwanted)
        core = core_for(tuple(self.distribution.commands))
        if core is not None:
            unwanted = shutil.ignore_patterns("__pycache__")
            shutil.copytree(core, self.build_lib, dirs_exist_ok=True, ignore=unwanted)
