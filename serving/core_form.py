"""Does the core run as plain Python or compiled, and where is the compiled one?

In a checkout `deploy/compile.py` compiles `router/` with mypyc into a folder of its own, named
after the digest of what it was made from and by. So it is never older than the sources: where
these have changed there is no folder of that name, and the plain ones run. Every process of ours
imports `serving` before `router`, and so gets the same form.

A wheel has the compiled modules beside the plain ones, or none: there is nothing to choose there.
"""

import hashlib
import importlib.metadata
import os
import sys
import sysconfig
from pathlib import Path
from typing import Literal

Form = Literal["compiled", "plain"]

VARIABLE = "HEADWAY_CORE"  # auto, plain, compiled
_ROOT = Path(__file__).resolve().parents[1]
FOLDER = _ROOT / ".venv" / "headway-core"
_SOURCES = _ROOT / "router"
_COMPILER = _ROOT / "deploy" / "compile.py"  # in a checkout alone


def use_core() -> None:
    """Have `import router` find the form that is wanted. Must come before the first such import.

    `HEADWAY_CORE` says which: plain; compiled, which must be there; or auto, which takes the
    compiled one where there is one. Raises `ImportError` if it is not there, or too late.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in ("auto", "plain", "compiled"):
        raise ImportError(f"{VARIABLE} is {wanted!r}; it can be auto, plain or compiled")
    if wanted == "plain" or not _COMPILER.exists():
        return
    folder = compiled_folder()
    if folder.is_dir() and "router" not in sys.modules:
        sys.path.insert(0, str(folder))
    elif wanted == "compiled" and form() == "plain":
        raise ImportError(
            f"no compiled core of these sources in {folder}: `make compile`"
            if not folder.is_dir()
            else "router was imported before serving, in its plain form"
        )


def form() -> Form:
    """Return what runs in this process."""
    from router.core import router

    return "plain" if str(router.__file__).endswith(".py") else "compiled"


def compiled_folder(sources: Path = _SOURCES) -> Path:
    """Return where the compiled form of these very sources is, or would be."""
    digest = hashlib.sha256(_maker().encode() + _COMPILER.read_bytes())
    for path in sorted(sources.rglob("*.py")):
        digest.update(str(path.relative_to(sources)).encode() + b"\0" + path.read_bytes())
    return FOLDER / digest.hexdigest()[:16]


def _maker() -> str:
    """Return the versions of what compiles, and of what it compiles for."""
    try:
        mypy = importlib.metadata.version("mypy")
    except importlib.metadata.PackageNotFoundError:
        mypy = ""
    glibc = "CS_GNU_LIBC_VERSION"
    libc = os.confstr(glibc) if glibc in os.confstr_names else ""
    return f"{mypy} {sysconfig.get_config_var('EXT_SUFFIX')} {libc} "
