"""Mutate part by part and judge what survives.

    python -m tests.mutants.run [PART ...]

A copy of the tree in `build/mutants` is mutated, never the tree itself. Ends with 1 if fewer than
90 % of a part's mutants are killed, or one survives that `survivors.yaml` does not explain.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.mutants.parts import PARTS, Part
from tests.mutants.survivors import Change, Explained

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "mutants"
TOOL = ROOT / "build" / "mutmut"
_VERSION = "3.8.1"
_LOCK = ROOT / "deploy" / "locks" / "cpu.txt"  # whose pytest is the one to use
_MIN_KILLED = 0.9
_COPIED = ("router", "serving", "benchmarks", "tests", "deploy", "pyproject.toml")
_CONFIG = """
[tool.mutmut]
source_paths = ["router", "serving", "benchmarks"]
only_mutate = {files}
pytest_add_cli_args_test_selection = {tests}
pytest_add_cli_args = ["-p", "no:cacheprovider", "-W", "ignore", "--hypothesis-seed=0"]
also_copy = ["deploy"]
use_git_change_detection = false
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="all, if none is named")
    names = parser.parse_args().parts
    if unknown := set(names) - {part.name for part in PARTS}:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    explained = Explained()
    _install_tool()
    is_good = True
    for part in PARTS:
        if not names or part.name in names:
            is_good &= _judge(part, explained)
    return 0 if is_good else 1


def _judge(part: Part, explained: Explained) -> bool:
    """Mutate one part; print what came of it. Return whether its tests are good enough."""
    folder = _copy_tree(part)
    log = folder / "mutmut.log"
    with log.open("wb") as out:
        ended = subprocess.run(
            [*_mutmut(), "run", "--max-children", "1"],
            cwd=folder,
            env=_environment(),
            stdout=out,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if ended.returncode:
        print(f"{part.name}: mutmut failed: {log}\n{log.read_text()[-3000:]}")
        return False
    _output(folder, "export-cicd-stats")
    counts = json.loads((folder / "mutants" / "mutmut-cicd-stats.json").read_text())
    survivors = Counter(_survivors(folder))
    unexplained = Counter(
        {each: count for each, count in survivors.items() if not explained.is_everywhere(each)}
    )
    unexplained -= explained.changes
    stale = Counter(
        {each: count for each, count in explained.changes.items() if each.file in part.files}
    )
    stale -= survivors
    num_killed = counts["total"] - survivors.total()
    share = num_killed / counts["total"]
    print(
        f"{part.name}: {num_killed} of {counts['total']} killed ({share:.1%}), "
        f"{survivors.total() - unexplained.total()} explained, {unexplained.total()} not",
        flush=True,
    )
    for title, changes in (("survives", unexplained), ("listed, and gone", stale)):
        for change in changes.elements():
            print(f"  {title}: {change}", flush=True)
    return share >= _MIN_KILLED and not unexplained


def _copy_tree(part: Part) -> Path:
    """Return a copy of the tree with this part's configuration."""
    folder = BUILD / part.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in _COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results")
            )
        else:
            shutil.copy(source, folder / name)
    with (folder / "pyproject.toml").open("a") as config:
        config.write(_CONFIG.format(files=json.dumps(part.files), tests=json.dumps(part.tests)))
    return folder


def _survivors(folder: Path) -> list[Change]:
    """Return what the mutants change that no test has noticed."""
    names = re.findall(
        r"^\s+(\S+): (?:survived|no tests|suspicious)$", _output(folder, "results"), re.MULTILINE
    )
    return [Change.of_mutant(name, _output(folder, "show", name)) for name in names]


def _install_tool() -> None:
    """Install mutmut beside the environment: nothing else needs it, so no lock holds it."""
    if (TOOL / f"mutmut-{_VERSION}.dist-info").exists():
        return
    uv = [str(Path(sys.executable).with_name("uv")), "pip", "install", "--python", sys.executable]
    target = ["--target", str(TOOL), "--constraint", str(_LOCK), f"mutmut=={_VERSION}"]
    subprocess.run([*uv, "--quiet", *target], check=True)


def _output(folder: Path, *arguments: str) -> str:
    """Return what mutmut prints."""
    return subprocess.run(
        [*_mutmut(), *arguments],
        cwd=folder,
        env=_environment(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def _mutmut() -> list[str]:
    return [sys.executable, "-m", "mutmut"]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(TOOL)}


if __name__ == "__main__":
    sys.exit(main())
