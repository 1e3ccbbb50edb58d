"""`headway config`, what shells complete, and hosts that are open to a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from serving.cli import options
from serving.cli.main import main
from serving.cluster.application import build
from serving.config import ConfigError
from serving.gateway.tenants.keys import KeysFile, make_key
from serving.planning.hardware import Hardware

GIB = 1 << 30
ROOT = Path(__file__).parents[3]
SAMPLES = sorted((ROOT / "deploy").glob("*.yaml"))
HEADWAY = Path(sys.executable).with_name("headway")


@pytest.fixture(autouse=True)
def laptop(monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = Hardware(
        cores=(0, 1), num_ram_bytes=24 * GIB, num_free_ram_bytes=20 * GIB, vllm_build="cpu"
    )
    monkeypatch.setattr(options, "detect_hardware", lambda: hardware)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, arguments)
    return result.exit_code, result.stdout, result.stderr


class TestSchema:
    @pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
    def test_samples_fit_it(self, path: Path) -> None:
        schema = json.loads(run("config", "schema")[1])
        jsonschema.Draft202012Validator.check_schema(schema)
        jsonschema.validate(yaml.safe_load(path.read_text()), schema)

    def test_mistakes_do_not(self) -> None:
        schema = json.loads(run("config", "schema")[1])
        content = yaml.safe_load((ROOT / "deploy" / "cpu.yaml").read_text())
        content["applications"][0]["args"]["gateway"]["prot"] = 1
        with pytest.raises(jsonschema.ValidationError, match="prot"):
            jsonschema.validate(content, schema)

    def test_every_key_has_a_type(self) -> None:
        schema = json.loads(run("config", "schema", "--args")[1])
        assert {"model", "engine", "gateway", "router"} <= set(schema["properties"])


def test_show_is_what_file_and_options_make(tmp_path: Path) -> None:
    redis = ("--set", "cache.redis_url=redis://:secret@host/0")
    code, shown, _ = run("config", "show", str(ROOT / "deploy/emulated8.yaml"), *redis)
    assert code == 0
    made = yaml.safe_load(shown)
    assert made["replicas"] == 8
    assert "secret" not in shown
    assert "router" not in made  # all of its keys are at their defaults
    shown = run("config", "show", "--all")[1]
    assert yaml.safe_load(shown)["router"]["policy"] == "headway"


def test_samples_are_listed_and_printed() -> None:
    listed = run("config", "sample")[1]
    for path in SAMPLES:
        assert f"{path.stem} " in listed
        assert run("config", "sample", path.stem)[1] == path.read_text()
    code, _, said = run("config", "sample", "nonsense")
    assert (code, len(said.splitlines())) == (2, 1)
    assert "there are cpu-haproxy.yaml, cpu.yaml" in said
    assert "cpu.yaml: no such file; the sample is /" in run("plan", "cpu.yaml")[2]


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("headway serve --policy least_k", "least_kv_usage"),
        ("headway serve org/", "org/model"),
    ],
)
def test_shells_complete(words: str, completed: str, tmp_path: Path) -> None:
    (tmp_path / "hub" / "models--org--model").mkdir(parents=True)
    variables = {
        "_HEADWAY_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
    }
    done = subprocess.run(
        [HEADWAY], env=os.environ | variables, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.split() == [completed], done.stderr


class TestOpenHosts:
    OPEN = ("--host", "0.0.0.0")

    def test_without_keys_are_refused(self) -> None:
        code, _, said = run("serve", *self.OPEN)
        assert code == 2
        assert len(said.splitlines()) == 1
        assert "gateway.host: 0.0.0.0 is open to the network" in said
        assert "headway key create" in said
        assert "--insecure" in said

    def test_behind_haproxy_too(self) -> None:
        assert "is open to the network" in run("serve", *self.OPEN, "--front", "haproxy")[2]

    @pytest.mark.parametrize("by", [("--insecure",), ("--set", "gateway.insecure=true")])
    def test_may_be_wanted(self, by: tuple[str, ...]) -> None:
        # It comes as far as the memory, which is not there.
        code, _, said = run("serve", *self.OPEN, "--replicas", "500", *by)
        assert code == 2
        assert "replicas: not enough memory" in said

    def test_with_keys_are_fine(self, tmp_path: Path) -> None:
        with KeysFile(tmp_path / "keys.json") as file:
            file.keys.append(make_key("acme")[1])
            file.save()
        keys = ("--set", f"auth.keys_file={tmp_path / 'keys.json'}")
        assert "not enough memory" in run("serve", *self.OPEN, "--replicas", "500", *keys)[2]

    def test_by_serve_run_are_refused_too(self) -> None:
        args = {"engine": "emulated", "gateway": {"host": "0.0.0.0"}}
        with pytest.raises(ConfigError, match=r"gateway\.host: 0\.0\.0\.0 is open"):
            build(args)


@pytest.mark.parametrize(
    ("torch", "vision", "is_wrong"),
    [
        ("2.13.0+cpu", "0.28.0", True),
        ("2.13.0+cpu", "0.28.0+cpu", False),
        ("2.13.0", "0.28.0", False),
    ],
)
def test_a_torchvision_that_breaks_vllm_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, torch: str, vision: str, is_wrong: bool
) -> None:
    """As `pip install headway[cpu]` may leave it."""
    versions = {"torch": torch, "torchvision": vision}
    monkeypatch.setattr(options, "version", versions.__getitem__)
    if is_wrong:
        code, _, said = run("serve", "--device", "cpu")
        assert (code, len(said.splitlines())) == (2, 1)
        assert "pip uninstall torchvision torchaudio torchcodec" in said
    else:
        options._check_torchvision_fits()


def test_missing_vllm_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = Hardware(cores=(0,), num_ram_bytes=24 * GIB, num_free_ram_bytes=20 * GIB)
    monkeypatch.setattr(options, "detect_hardware", lambda: hardware)
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda _: None)
    code, _, said = run("serve")
    assert (code, len(said.splitlines())) == (2, 1)
    assert "vLLM is not installed: pip install 'headway[cpu]'" in said
    assert run("plan", "--set", "engine=emulated")[0] == 0
