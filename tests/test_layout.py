"""No folder has more than 12 entries and no Python file over 400 lines, but for a stated reason."""

import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
MAX_ENTRIES = 12  # `__init__.py` counts
MAX_LINES = 400
# By path: why it is longer.
LONG_FILES: dict[str, str] = {
    "serving/engine/vllm/patches.py": "one table, read as a whole when vLLM is upgraded",
}


def full_folders(paths: Iterable[str]) -> list[str]:
    """Return the folders with Python in them that have too many entries, and how many."""
    entries: dict[PurePosixPath, set[PurePosixPath]] = defaultdict(set)
    with_python = set()
    for path in map(PurePosixPath, paths):
        if path.suffix == ".py":
            with_python.add(path.parent)
        for child, folder in zip((path, *path.parents), path.parents, strict=False):
            entries[folder].add(child)
    numbers = {str(folder): len(entries[folder]) for folder in sorted(with_python)}
    return [f"{folder}: {number}" for folder, number in numbers.items() if number > MAX_ENTRIES]


def long_files(num_lines: Mapping[str, int], reasons: Mapping[str, str]) -> list[str]:
    """Return the files that are too long without a reason, and reasons that nothing needs."""
    too_long = {path for path, number in num_lines.items() if number > MAX_LINES}
    found = [f"{path}: {num_lines[path]} lines" for path in sorted(too_long - reasons.keys())]
    return found + [f"{path}: needs no reason" for path in sorted(reasons.keys() - too_long)]


def tracked() -> list[str]:
    """Return the files of the working tree that git knows, by path."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    return [path for path in listed.stdout.decode().split("\0") if path and (ROOT / path).exists()]


def test_no_folder_is_full():
    assert full_folders(tracked()) == []


def test_no_file_is_long():
    paths = [path for path in tracked() if path.endswith(".py")]
    num_lines = {path: len((ROOT / path).read_text().splitlines()) for path in paths}
    assert long_files(num_lines, LONG_FILES) == []


def test_full_folders_are_found():
    names = [f"a/b/{number}.py" for number in range(MAX_ENTRIES)]
    assert full_folders(names) == []
    assert full_folders([*names, "a/b/c.yaml"]) == ["a/b: 13"]
    assert full_folders([*names, "a/b/c/d/e.py", "a/b/c/f.py"]) == ["a/b: 13"]
    assert full_folders([f"a/{number}.md" for number in range(99)]) == []


def test_long_files_are_found():
    num_lines = {"a.py": MAX_LINES, "b.py": MAX_LINES + 1}
    assert long_files(num_lines, {}) == ["b.py: 401 lines"]
    assert long_files(num_lines, {"b.py": "one table"}) == []
    assert long_files(num_lines, {"a.py": "", "b.py": ""}) == ["a.py: needs no reason"]
