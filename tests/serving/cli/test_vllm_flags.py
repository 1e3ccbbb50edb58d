"""Which options are vLLM's, and what becomes of them before and after its parser."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from serving.cli import options, vllm_flags
from serving.cli.main import main
from serving.config import ConfigError
from serving.planning.hardware import Hardware

GIB = 1 << 30
OURS = {"--port": 1, "--set": 1, "--verbose": 0, "-v": 0, "-tp": 1, "--served-model-name": 1}


@pytest.mark.parametrize(
    ("arguments", "own", "others"),
    [
        ("m --port 1 -v", "m --port 1 -v", ""),
        ("m --max-model-len 8k --port 1", "m --port 1", "--max-model-len 8k"),
        ("--max_model_len 8k m", "m", "--max_model_len 8k"),
        ("--max-model-len=8k m", "m", "--max-model-len=8k"),
        ("--enforce-eager m", "m", "--enforce-eager"),
        ("--no-enable-prefix-caching m", "m", "--no-enable-prefix-caching"),
        ("m --lora-modules a=/a b=/b --port 1", "m --port 1", "--lora-modules a=/a b=/b"),
        ("m --compilation-config.mode 3 -v", "m -v", "--compilation-config.mode 3"),
        ("m -pp 2 -tp 4 -O3", "m -tp 4", "-pp 2 -O3"),
        ("m --seed -1 -v", "m -v", "--seed -1"),
        ("m --served_model_name x", "m --served-model-name x", ""),
        ("m --set a=--b --dtype half", "m --set a=--b", "--dtype half"),
        ("m -- --dtype half", "m -- --dtype half", ""),
    ],
)
def test_options_are_told_apart(arguments: str, own: str, others: str) -> None:
    found = vllm_flags.set_aside(arguments.split(), OURS)
    assert found == (own.split(), others.split())


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Two cores, no network, and a parser that says 8192 to everything; what it is given."""
    hardware = Hardware(
        cores=(0, 1), num_ram_bytes=24 * GIB, num_free_ram_bytes=20 * GIB, vllm_build="cpu"
    )
    monkeypatch.setattr(options, "detect_hardware", lambda: hardware)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    given: list[list[str]] = []

    def read(flags: list[str]) -> dict[str, int]:
        given.append(flags)
        return {flag.removeprefix("--").replace("-", "_"): 8192 for flag in flags[::2]}

    monkeypatch.setattr(options, "read_flags", read)
    return given


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, arguments)
    return result.exit_code, result.stdout, result.stderr


def test_they_become_engine_arguments(parsed: list[list[str]]) -> None:
    code, shown, _ = run("plan", "org/m-1b", "--max-model-len", "8k", "--replicas", "1")
    assert code == 0
    assert parsed == [["--max-model-len", "8k"]]
    assert "max_model_len = 8192  (yours)" in shown
    assert "org/m-1b, served as org/m-1b" in shown


def test_data_parallel_size_is_the_number_of_engines(parsed: list[list[str]]) -> None:
    for name in ("-dp", "--data-parallel-size", "--replicas"):
        assert "1 × " in run("plan", name, "1")[1]
    assert parsed == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-modellen", "8k"], "--max-modellen: no such option, of Headway or of vLLM; did "),
        (["--polcy", "x"], "did you mean --policy?"),
        (["--api-key", "x"], "--api-key: set auth.keys_file instead"),
        (["--uvicorn-log-level", "x"], "belongs to vLLM's own HTTP server"),
        (["--set", "engine=emulated", "--max-model-len", "8k"], "this engine is not vLLM"),
        (["org/m", "--model", "org/n"], "--model org/n: org/m is the model already"),
    ],
)
def test_mistakes_need_no_parser(
    parsed: list[list[str]], arguments: list[str], message: str
) -> None:
    for command in ("plan", "serve"):
        code, _, said = run(command, *arguments)
        assert code == 2
        assert len(said.splitlines()) == 1
        assert message in said
    assert parsed == []


def test_without_vllm_an_unknown_option_says_so(
    parsed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_flags, "engine_names", frozenset)
    monkeypatch.setattr(vllm_flags, "server_names", frozenset)
    assert (
        "--dtype: no such option, and vLLM, which may have it, is not installed"
        in run("plan", "--dtype", "half")[2]
    )


@pytest.mark.parametrize(
    ("stdout", "stderr", "message"),
    [
        (json.dumps({"error": "argument --seed: invalid"}), "", "vLLM refuses it: argument --seed"),
        ("", "a\nImportError: no libnuma", "vLLM cannot read --seed: ImportError: no libnuma"),
        ("noise", "", "vLLM cannot read --seed: exit status 1"),
    ],
)
def test_what_its_parser_says_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, stdout: str, stderr: str, message: str
) -> None:
    done = SimpleNamespace(stdout=stdout, stderr=stderr, returncode=1)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(ConfigError, match=message):
        vllm_flags.read_flags(["--seed", "x"])


def test_what_is_no_json_becomes_some() -> None:
    values = json.dumps([{1}, (2,), sys], default=vllm_flags._as_json)
    assert json.loads(values) == [[1], [2], str(sys)]
