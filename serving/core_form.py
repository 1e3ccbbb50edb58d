"""Does the core run as plain Python or compiled, and where is the compiled one?

In a checkout `deploy/compile.py` compiles `router/` with mypyc into a folder of its own, named
after the digest of what it was made from and by. So it is never older than the sources: where
these have changed there is no folder of that name, and the plain ones run. Every process of ours
imports `serving` before `router`, and so gets the same form.

A wheel has the compiled modules in place of the plain ones, or none: `HEADWAY_CORE` chooses
nothing there, but insists.

Reading all sources and finding out who would compile them takes every process 60 ms. So the one
that has found a folder notes beside it how the sources looked, and the next ones look only at that.
"""

import os
import sys
import time
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Literal

Form = Literal["compiled", "plain"]

VARIABLE = "HEADWAY_CORE"  # auto, plain, compiled
_ROOT = Path(__file__).resolve().parents[1]
FOLDER = _ROOT / ".venv" / "headway-core"
_SOURCES = _ROOT / "router"
_COMPILER = _ROOT / "deploy" / "compile.py"  # in a checkout alone
_NOTE = "as-seen"  # in FOLDER: the last digest that was found, and how all looked that went into it
# A file may change again within the grain of its times: what is so young is not noted.
_YOUNG_S = 2.0


def use_core() -> None:
    """Have `import router` find the form that is wanted. Must come before the first such import.

    `HEADWAY_CORE` says which: plain; compiled, which must be there; or auto, which takes the
    compiled one where there is one. Raises `ImportError` if it is not there, or too late.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in ("auto", "plain", "compiled"):
        raise ImportError(f"{VARIABLE} is {wanted!r}; it can be auto, plain or compiled")
    if not _COMPILER.exists():
        _insist_on(wanted)
        return
    if wanted == "plain" or (wanted == "auto" and not FOLDER.is_dir()):
        return
    folder = _folder_as_noted() or _find_and_note()
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
    import hashlib  # late, as all that the note spares

    digest = hashlib.sha256(_maker().encode() + _COMPILER.read_bytes())
    for path in sorted(sources.rglob("*.py")):
        digest.update(str(path.relative_to(sources)).encode() + b"\0" + path.read_bytes())
    return FOLDER / digest.hexdigest()[:16]


def _insist_on(wanted: str) -> None:
    """Raise `ImportError` unless an installed core has the form that is wanted."""
    found = "plain"
    if any((_SOURCES / "core" / f"router{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        found = "compiled"
    if wanted not in ("auto", found):
        raise ImportError(
            f"{VARIABLE} is {wanted}, but the core in {_SOURCES} was installed {found}: "
            + (
                "install a wheel for this Python and machine, or build it where there is a "
                "C compiler"
                if wanted == "compiled"
                else "build the wheel where CC names no compiler, or unset it"
            )
        )


def _folder_as_noted() -> Path | None:
    """Return the folder that was noted if nothing has changed since; None if something may have."""
    try:
        name, _, looks = (FOLDER / _NOTE).read_text().partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return FOLDER / name if name and looks == "\n".join(_looks()) else None


def _find_and_note() -> Path:
    """Return the folder of these sources, there or not. Note it unless something just changed."""
    before = list(_looks())
    folder = compiled_folder()
    if before == list(_looks()) and not _has_just_changed():
        note = FOLDER / f"{_NOTE}.{os.getpid()}"
        try:
            note.write_text("\n".join([folder.name, *before]))
            note.replace(FOLDER / _NOTE)
        except OSError:
            pass  # somebody else's folder: it is found each time
    return folder


def _looks() -> Iterator[str]:
    """Yield how each thing looks that goes into the digest: nobody sets a file's change time."""
    yield f"{EXTENSION_SUFFIXES[0]} {_libc()}"
    for path, stat in _stats():
        yield f"{path} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"


def _has_just_changed() -> bool:
    youngest_s = max(stat.st_ctime for _, stat in _stats())
    return time.time() - youngest_s < _YOUNG_S


def _stats() -> Iterator[tuple[str, os.stat_result]]:
    """Yield path and state of the sources, of the compiler, and of where mypy is installed."""
    yield str(_COMPILER), _COMPILER.stat()
    for entry in sys.path:  # another mypy is another folder in it
        if entry.endswith(("site-packages", "dist-packages")) and os.path.isdir(entry):
            yield entry, os.stat(entry)
    folders = [str(_SOURCES)]
    for folder in folders:  # which grows
        with os.scandir(folder) as entries:
            for each in sorted(entries, key=lambda each: each.name):
                if each.name.endswith(".py"):
                    yield each.path, each.stat()
                elif each.is_dir() and each.name != "__pycache__":
                    folders.append(each.path)


def _maker() -> str:
    """Return the versions of what compiles, and of what it compiles for."""
    import importlib.metadata

    try:
        mypy = importlib.metadata.version("mypy")
    except importlib.metadata.PackageNotFoundError:
        mypy = ""
    return f"{mypy} {EXTENSION_SUFFIXES[0]} {_libc()} "


def _libc() -> str:
    name = "CS_GNU_LIBC_VERSION"
    return (os.confstr(name) if name in os.confstr_names else "") or ""
