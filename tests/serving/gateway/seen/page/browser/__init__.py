"""A headless Chromium, and the rules of accessibility that pages are held to, both from npm."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
_FOLDER = Path(__file__).resolve().parents[6] / ".venv" / "browser"
MODULES = _FOLDER / "node_modules"
# Those of Chromium's sandbox and processes that a container does without.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


def install_browser() -> Path:
    """Return Chromium's path, installed where it was not. Skips the test without Node or npm."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("there is no Node with npm, which Chromium comes by")
    lock = (_HERE / "package-lock.json").read_bytes()
    installed = _FOLDER / "package-lock.json"
    if not installed.exists() or installed.read_bytes() != lock or not MODULES.is_dir():
        _FOLDER.mkdir(parents=True, exist_ok=True)
        installed.unlink(missing_ok=True)
        for name in ("package.json", "chromium.mjs"):
            shutil.copy(_HERE / name, _FOLDER)
        installed.write_bytes(lock)
        try:
            subprocess.run(
                [npm, "ci", "--no-audit", "--no-fund"], cwd=_FOLDER, check=True, capture_output=True
            )
        except subprocess.CalledProcessError as error:
            installed.unlink()
            pytest.fail(f"npm cannot install Chromium: {error.stderr.decode()[-2000:]}")
    env = os.environ | {"TMPDIR": str(_FOLDER)}
    found = subprocess.run(
        [node, "chromium.mjs"], cwd=_FOLDER, env=env, check=True, capture_output=True, text=True
    )
    return Path(found.stdout.strip())
