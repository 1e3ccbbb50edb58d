"""`make install` decides without installing; and what the locks must be."""

import ast
import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "deploy" / "install.py"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TORCH_CPU = PROJECT["tool"]["uv"]["dependency-metadata"][0]["version"]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the script as a module, its `.venv` in an empty folder."""
    spec = importlib.util.spec_from_file_location("headway_install", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    venv = tmp_path / ".venv"
    monkeypatch.setattr(module, "VENV", venv)
    monkeypatch.setattr(module, "PYTHON", venv / "bin" / "python")
    monkeypatch.setattr(module, "STAMP", venv / "stamp.json")
    monkeypatch.setenv("HEADWAY_DEVICE", "cpu")
    return module


def pretend(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let every step be noted instead of done; return the notes."""
    steps: list[str] = []

    def make_venv() -> None:
        steps.append("venv")
        install.PYTHON.parent.mkdir(parents=True)
        install.PYTHON.write_text("")

    monkeypatch.setattr(install, "make_venv", make_venv)
    monkeypatch.setattr(install, "install_cpu_torch", lambda version: steps.append(version))
    monkeypatch.setattr(install, "uv", lambda *arguments: steps.append(arguments[0]))
    monkeypatch.setattr(install, "say", lambda line: None)
    return steps


def test_installs_once(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = pretend(install, monkeypatch)
    install.main()
    assert steps == ["venv", TORCH_CPU, "-r", "-e"]
    install.main()
    assert steps == ["venv", TORCH_CPU, "-r", "-e"]


def test_an_interrupted_run_is_made_good(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = pretend(install, monkeypatch)

    def fail(*arguments: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(install, "uv", fail)
        with pytest.raises(KeyboardInterrupt):
            install.main()
    install.PYTHON.unlink()
    install.PYTHON.parent.rmdir()
    steps.clear()
    install.main()
    assert steps == ["venv", TORCH_CPU, "-r", "-e"]


def test_only_what_changed_is_installed_anew(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = pretend(install, monkeypatch)
    install.main()
    steps.clear()
    stamp = install.STAMP.read_text()
    install.STAMP.write_text(re.sub(r'"project": "\w+"', '"project": "old"', stamp))
    install.main()
    assert steps == ["-e"]


@pytest.mark.parametrize("version", [(3, 10, 13), (3, 15, 0)])
def test_a_python_that_does_not_fit_is_one_clear_line(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int, int]
) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    with pytest.raises(install.InstallError, match=r"3.11 to 3.14 is needed.*PYTHON=python3"):
        install.check_python()


def test_an_old_python_gets_as_far_as_that_line() -> None:
    ast.parse(SCRIPT.read_text(), feature_version=(3, 7))


def test_an_unknown_device_is_refused(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWAY_DEVICE", "tpu")
    with pytest.raises(install.InstallError, match="cpu or gpu"):
        install.main()


def test_finds_the_torch_wheel_that_fits(install: ModuleType, tmp_path: Path) -> None:
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    machine = install.platform.machine()
    for folder, name in [
        ("other_version", f"torch-1.0+cpu-{tag}-{tag}-manylinux_2_28_{machine}.whl"),
        ("other_python", f"torch-2.0+cpu-cp27-cp27-manylinux_2_28_{machine}.whl"),
        ("other_machine", f"torch-2.0+cpu-{tag}-{tag}-manylinux_2_28_vax.whl"),
        ("fits", f"torch-2.0%2Bcpu-{tag}-{tag}-manylinux_2_28_{machine}.whl"),
    ]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).touch()
    links = ["https://example.org/wheels", str(tmp_path / "nowhere")]
    links += [str(tmp_path / name) for name in ("other_version", "other_python", "other_machine")]
    assert install.find_torch_wheel("2.0+cpu", links) is None
    links.append(f"file://{tmp_path / 'fits'}")
    assert install.find_torch_wheel("2.0+cpu", links) == tmp_path / "fits"


@pytest.mark.parametrize("device", ["cpu", "gpu"])
class TestLock:
    def test_every_line_is_a_pin_or_a_comment(self, device: str) -> None:
        """No index, folder or URL: they would be those of whoever ran `make lock`."""
        for line in (ROOT / "deploy" / "locks" / f"{device}.txt").read_text().splitlines():
            assert re.fullmatch(r"[\w.-]+==[\w.+!]+( ; [^;]+)?|    #( .*)?", line), line
            assert "://" not in line

    def test_holds_all_that_pyproject_asks_for(self, device: str) -> None:
        lock = (ROOT / "deploy" / "locks" / f"{device}.txt").read_text()
        pins = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", lock, re.MULTILINE))
        extras = PROJECT["project"]["optional-dependencies"]
        for requirement in PROJECT["project"]["dependencies"] + extras[device] + extras["dev"]:
            name = re.match(r"[\w.-]+", requirement)
            assert name is not None
            pin = pins[name[0].lower()]
            if "==" in requirement:
                assert requirement.split("==")[1].split()[0] == pin
        assert device == "gpu" or pins["torch"] == TORCH_CPU
