"""Compiles the core with mypyc: `make compile`. What differs then: docs/compiled.md.

    router/**.py  --copied, split-->  a build folder  --mypyc, C compiler-->  DIGEST/router

Nothing is written beside the sources; `serving/core_form.py` says where, and who finds it there.
Where it cannot be compiled the core stays plain Python, which one line says. `setup.py` does the
same for a wheel.
"""

import argparse
import ast
import fcntl
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HEADWAY_CORE"] = "plain"  # this process compiles it, and needs none

from serving.core_form import FOLDER, compiled_folder  # noqa: E402

# Beside those that import pydantic, whose classes read what was written of them.
PLAIN = ("scheduling/policies/base.py",)  # reads what a class defines by itself
MAX_KEPT = 3  # compiled forms, of the last sources: something may still run with an older one
_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

# In a process of its own: mypyc works in the current folder, and leaves by `sys.exit`.
_MAKE_C = """
import json, sys
from mypyc.build import mypycify
extensions = mypycify(
    sys.argv[1:], group_name="headway_core", multi_file=True, target_dir="c"
)
print(json.dumps([[each.name, each.sources, each.include_dirs] for each in extensions]))
"""


class CannotCompile(Exception):
    """Why the core stays plain Python, in a few words."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the core with mypyc.")
    parser.add_argument("--force", action="store_true", help="also if it is there")
    try:
        find_or_compile(force=parser.parse_args().force)
    except CannotCompile as problem:
        say(f"{problem}: the core runs as plain Python, decisions take two to nine times as long")
    except KeyboardInterrupt:
        say("interrupted; run it again to compile the core")
        sys.exit(130)


def find_or_compile(*, force: bool = False) -> Path:
    """Return the folder with the compiled form of the sources. Raises `CannotCompile`."""
    if compiled_folder().is_dir() and not force:
        return compiled_folder()
    check_compiler()
    try:
        FOLDER.mkdir(parents=True, exist_ok=True)
        with (FOLDER / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes second finds it made
            if compiled_folder().is_dir() and not force:
                return compiled_folder()
            say("compiling the core, which takes a minute or two")
            return _compile_checkout()
    except OSError as error:  # a full disk, a folder of somebody else
        raise CannotCompile(f"{FOLDER} cannot be written ({error.strerror})") from None


def _compile_checkout() -> Path:
    """Compile into the folder of the sources' digest, and return it; the caller has the lock."""
    for left in FOLDER.glob("build-*"):  # by one that was killed: nobody else has the lock
        shutil.rmtree(left)
    build = Path(tempfile.mkdtemp(dir=FOLDER, prefix="build-"))
    try:
        compile_into(build / "core", build)
        # What was copied counts: the sources may have changed since.
        folder = compiled_folder(build / "sources" / "router")
        shutil.rmtree(folder, ignore_errors=True)
        (build / "core").rename(folder)
    finally:
        shutil.rmtree(build)
    made = [path for path in FOLDER.iterdir() if path.is_dir()]
    for path in sorted(made, key=lambda path: -path.stat().st_mtime)[MAX_KEPT:]:
        shutil.rmtree(path)
    return folder


def compile_into(target: Path, build: Path) -> None:
    """Make `target`: the package `router` with an extension module beside each compiled one.

    Leaves a copy of the sources in `build`. Raises `CannotCompile`.
    """
    sources = build / "sources"
    shutil.copytree(ROOT / "router", sources / "router", ignore=shutil.ignore_patterns("__py*"))
    shutil.copytree(sources, target)
    modules = [path for path in sorted(target.rglob("*.py")) if split(path, target)]
    (target / "mypy.ini").write_text("[mypy]\nplugins = pydantic.mypy\n")
    made = subprocess.run(
        [sys.executable, "-c", _MAKE_C, *(str(path.relative_to(target)) for path in modules)],
        cwd=target,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    if made.returncode != 0:
        lines = (made.stderr + made.stdout).strip().splitlines() or ["it says nothing"]
        first = next((line for line in lines if ": error: " in line), lines[-1])
        raise CannotCompile(f"mypyc refuses it ({first})")
    extensions = json.loads(made.stdout.splitlines()[-1])
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = {
            source: pool.submit(_make_object, target, source, includes)
            for _, files, includes in extensions
            for source in files
        }
        for module, files, _ in extensions:
            _link(target, module, [objects[source].result() for source in files])
    shutil.rmtree(target / "c")
    shutil.rmtree(target / ".mypy_cache", ignore_errors=True)
    (target / "mypy.ini").unlink()


def split(path: Path, root: Path) -> bool:
    """Make a copied module fit for mypyc. Return False if there is nothing to compile in it.

    mypyc makes classes such as `msgspec.Struct` without their options (`frozen=True`), most of
    their annotations and their docstrings. So they move into a plain module beside, `..._plain`,
    with the values that they name, and are imported from there; pickles know them as before. No
    other line gets another number.
    """
    source = path.read_text()
    name = str(path.relative_to(root / "router"))
    if path.name == "__init__.py" or name in PLAIN or "\nfrom pydantic import " in source:
        return False
    body = ast.parse(source).body
    logic = [node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    moved: list[ast.stmt] = [node for node in logic if _stays_plain(node)]
    if len(moved) == len(logic):
        return False
    if not moved:
        return True
    module = ".".join(path.relative_to(root).with_suffix("").parts)
    belong = [f"{name}.__module__ = {module!r}" for node in moved for name in _names(node)]
    for node in moved:  # which grows
        needed = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
        values = [each for each in body if isinstance(each, ast.Assign) and each not in moved]
        moved += [each for each in values if needed & set(_names(each))]
    moved.sort(key=lambda node: node.lineno)
    names = [name for node in moved for name in _names(node)]
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    lines = source.splitlines()
    parts = ["\n".join(lines[_first(node) : node.end_lineno]) for node in (*imports, *moved)]
    path.with_stem(path.stem + "_plain").write_text("\n".join([*parts, *belong, ""]))
    for node in moved:
        for number in range(_first(node), node.end_lineno or 0):
            lines[number] = ""
    # After the docstring, in its last line.
    exported = ", ".join(f"{name} as {name}" for name in names)
    lines[(body[0].end_lineno or 0) - 1] += f"; from {module}_plain import {exported}"
    path.write_text("\n".join([*lines, ""]))
    return True


def _stays_plain(node: ast.stmt) -> bool:
    """Whether it is a class of a metaclass to which mypyc does no justice, or needs `__dict__`."""
    if not isinstance(node, ast.ClassDef):
        return False
    bases = {ast.unparse(base) for base in node.bases}
    return bool(bases & {"msgspec.Struct", "Enum", "enum.Enum"}) or any(
        isinstance(each, ast.Name) and each.id == "cached_property" for each in ast.walk(node)
    )


def _names(node: ast.stmt) -> list[str]:
    """Return what a class or an assignment defines."""
    if isinstance(node, ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [
        each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)
    ]


def _first(node: ast.stmt) -> int:
    """Return the index of a statement's first line, its decorators included."""
    decorators = node.decorator_list if isinstance(node, ast.ClassDef) else []
    return min([node.lineno, *(each.lineno for each in decorators)]) - 1


def check_compiler() -> None:
    """Raise `CannotCompile` where something is missing."""
    if shutil.which(_compiler()[0]) is None:
        raise CannotCompile("no C compiler")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "try.c").write_text("#include <Python.h>\n")
        _make_object(Path(folder), "try.c", [])
    for package in ("mypyc", "msgspec", "numpy", "pydantic"):  # mypyc reads the types of the rest
        if importlib.util.find_spec(package) is None:
            raise CannotCompile(f"no {package}")


def _compiler() -> list[str]:
    """Return the command: `CC`, or what Python was built with if it is here, or `cc`."""
    if "CC" in os.environ:
        return shlex.split(os.environ["CC"]) or ["cc"]
    command = shlex.split(sysconfig.get_config_var("CC") or "cc")
    return command if shutil.which(command[0]) else ["cc"]


def _make_object(folder: Path, source: str, includes: list[str]) -> str:
    """Compile one C file; return the object's path, relative to `folder`."""
    made = source.removesuffix(".c") + ".o"
    paths = [f"-I{path}" for path in (*includes, sysconfig.get_path("include"))]
    flags = ["-O3", "-fwrapv", "-fPIC", "-DNDEBUG", "-w"]
    _run([*_compiler(), *flags, *paths, "-c", source, "-o", made], folder)
    return made


def _link(folder: Path, module: str, objects: list[str]) -> None:
    """Make an extension module of the objects."""
    _run([*_compiler(), "-shared", *objects, "-o", module.replace(".", "/") + _SUFFIX], folder)


def _run(command: list[str], folder: Path) -> None:
    """Run the C compiler. Raises `CannotCompile` with the first that it says."""
    done = subprocess.run(command, cwd=folder, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        reason = said[0] if said else f"exit status {done.returncode}"
        raise CannotCompile(f"the C compiler {command[0]} fails ({reason})")


def say(line: str) -> None:
    print("headway: " + line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
