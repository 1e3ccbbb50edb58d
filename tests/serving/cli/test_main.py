"""The command line: one line per mistake."""

import contextlib
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from rich.console import Console
from typer.testing import CliRunner

from serving.cli import main, options
from serving.cli.config_file import load_config_file
from serving.cli.launching.progress import (
    AppState,
    DeploymentState,
    ProgressDisplay,
    engine_core_error,
    engine_phases,
)
from serving.cluster.logs import last_error, start_failure
from serving.cluster.processes import RUN_VARIABLE
from serving.cluster.ray_session import private_environment
from serving.config import ConfigError
from serving.core_form import form
from serving.planning.hardware import Hardware
from tests.support.running_gateway import free_port

GIB = 1 << 30
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def laptop(monkeypatch: pytest.MonkeyPatch) -> Hardware:
    """Two cores and 20 GiB, whatever this machine has, and no network."""
    hardware = Hardware(
        cores=(0, 1), num_ram_bytes=24 * GIB, num_free_ram_bytes=20 * GIB, vllm_build="cpu"
    )
    monkeypatch.setattr(options, "detect_hardware", lambda: hardware)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    return hardware


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main.main, arguments)


def write(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(textwrap.dedent(text))
    return str(path)


def application(
    args: str = "{}", import_path: str = "serving.cluster.application:build", more: str = ""
) -> str:
    return f"""
applications:
  - name: x
    import_path: {import_path}
    args: {args}
{more}"""


class TestMistakes:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a: [", "is not YAML"),
            ("just a text", "is not a Ray Serve config file"),
            (
                "model: m",
                "it has no `applications` (Headway's keys stand under applications.0.args)",
            ),
            (application("{modle: m}"), "modle: "),
            (application("{gateway: {prot: 1}}"), "gateway.prot: "),
            (application("{replicas: many}"), "replicas"),
            (application("[1]"), "applications.0.args: must be a mapping"),
            (application(more="proxy_loc: x"), "proxy_loc: unknown key"),
            (application(more="    deployments: []"), "applications.0.deployments: "),
            (application(import_path="a.b:c"), "applications.0.import_path: 'a.b:c' is not"),
            (application(more="proxy_location: EveryNode"), "proxy_location: must be Disabled"),
            (
                application("{gateway: {front: haproxy}}", more="proxy_location: Disabled"),
                "proxy_location: Disabled leaves",
            ),
            (
                application("{gateway: {front: haproxy}}", more="proxy_location: Nowhere"),
                "proxy_location: Input should be",
            ),
            (application("{device: cuda}"), "device: no NVIDIA GPU is visible"),
            (application("{tensor_parallel_size: 2}"), "tensor_parallel_size: 2 needs GPUs"),
            (application("{replicas: 50}"), "replicas: not enough memory"),
        ],
    )
    def test_in_the_file(self, tmp_path: Path, text: str, message: str) -> None:
        result = run("plan", write(tmp_path, text))
        assert result.exit_code == 2
        assert len(result.stderr.splitlines()) == 1
        assert message in result.stderr

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nowhere.yaml"], "nowhere.yaml: cannot be read: No such file"),
            (["--set", "router.polic=x"], "router.polic: "),
            (["--set", "router"], "--set router: is not of the form KEY=VALUE"),
            (["--set", "replicas=["], "replicas: '[' is not YAML"),
            (["--policy", "best"], "router.policy: "),
            (["--front", "nginx"], "gateway.front: "),
            (["--port", "99999"], "gateway.port: "),
            (["--replicas", "0"], "replicas: 0 engines cannot serve"),
            (["--set", "engine.args.max_modellen=8"], "did you mean max_model_len?"),
            (["--set", "engine.args.api_key=x"], "engine.args.api_key: set `auth.keys_file`"),
        ],
    )
    @pytest.mark.parametrize("command", ["plan", "serve"])
    def test_in_an_option(self, command: str, arguments: list[str], message: str) -> None:
        result = run(command, *arguments)
        assert result.exit_code == 2
        assert len(result.stderr.splitlines()) == 1
        assert message in result.stderr

    def test_a_port_in_use_starts_nothing(self) -> None:
        children = set(psutil.Process().children(recursive=True))
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            result = run("serve", "--port", str(port))
        assert result.exit_code == 1
        assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in result.stderr
        assert "choose another with --port" in result.stderr
        assert set(psutil.Process().children(recursive=True)) <= children

    def test_a_port_of_one_gateway_in_use_is_named(self) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(100):  # until the port before it is free as well
                server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
                port = server.getsockname()[1]
                with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port - 1)):
                    break
            options = (f"gateway.metrics_port={port - 1}", "gateway.replicas=2")
            own = ("--port", str(free_port()))  # somebody may have that of the documents
            result = run("serve", *own, *(part for option in options for part in ("--set", option)))
        assert result.exit_code == 1
        assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in result.stderr
        assert "choose another with gateway.metrics_port" in result.stderr

    def test_a_host_of_somebody_else(self) -> None:
        result = run("serve", "--host", "203.0.113.1", "--insecure")
        assert result.exit_code == 1
        assert "cannot listen on 203.0.113.1:8000" in result.stderr

    def test_a_service_that_cannot_be_measured(self, tmp_path: Path) -> None:
        children = set(psutil.Process().children(recursive=True))
        output = tmp_path / "profile.yaml"
        options = ("--set", "engine.factory=nowhere:Engine", "--output", str(output))
        result = run("profile", *options)
        assert result.exit_code == 1
        reason = "cannot start: ModuleNotFoundError: No module named 'nowhere'"
        assert result.stderr == f"headway: headway serve ended: {reason}\n"
        assert not output.exists()
        assert set(psutil.Process().children(recursive=True)) <= children

    def test_a_package_that_only_developers_have(self) -> None:
        lines = "import sys; sys.modules['scipy'] = None; from serving.cli.main import main; main()"
        command = [sys.executable, "-c", lines, "profile"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert result.returncode == 2
        assert result.stderr == (
            "headway: this command needs the module scipy: pip install scipy\n"
        )


def test_plan_shows_what_and_why() -> None:
    result = run("plan", "--set", "engine.args.seed=7")
    assert result.exit_code == 0
    for part in ("2 engines of one core", "seed = 7  (yours)", "KV cache", "20.0 of 24.0 GiB"):
        assert part in result.stdout


def test_served_names_are_repeatable() -> None:
    result = run("plan", "--served-model-name", "a", "--served-model-name", "b")
    assert result.exit_code == 0
    assert re.search(r"served as a, b\n", re.sub(" +\n", "\n", result.stdout))


def test_plan_tells_what_is_not_known() -> None:
    unknown = run("plan", "--model", "org/model")
    assert "not known: the model's weights, and 2.8 GiB each beside them" in unknown.stdout
    guessed = run("plan", "--model", "Qwen/Qwen3-8B")
    assert "about 32.6 GiB each, 32.6 GiB in all, guessed by the model's name" in guessed.stdout
    for result in (unknown, guessed):
        assert "max_model_len = the longest that the KV cache holds" in result.stdout
        assert "-1" not in result.stdout


def test_version() -> None:
    shown = run("version").stdout
    assert "ray 2." in shown
    assert shown.endswith(f"\ncore {form()}\n")
    assert run("--version").stdout == shown


class TestConfigFile:
    def test_host_and_port_go_to_what_listens(self) -> None:
        own = load_config_file(None, {"host": "0.0.0.0", "port": 1234})
        assert (own.config.gateway.host, own.config.gateway.port) == ("0.0.0.0", 1234)
        assert own.url == "http://127.0.0.1:1234"
        assert list(own.metrics_ports(1)) == []
        several = {"gateway.metrics_port": 9100}
        assert list(load_config_file(None, several).metrics_ports(3)) == [9100, 9101, 9102]
        tls = {"gateway.tls_cert_file": "/a.crt", "gateway.tls_key_file": "/a.key"}
        assert load_config_file(None, tls).url == "https://127.0.0.1:8000"
        proxied = load_config_file(None, {"gateway.front": "haproxy", "port": 1234})
        assert proxied.serve["http_options"] == {"host": "127.0.0.1", "port": 1234}
        assert proxied.config.gateway.port == 8000
        assert proxied.url == "http://127.0.0.1:1234"

    @pytest.mark.parametrize(("name", "front"), [("cpu", "haproxy"), ("cpu-haproxy", "own")])
    def test_the_front_can_be_swapped(self, name: str, front: str) -> None:
        file = load_config_file(ROOT / f"deploy/{name}.yaml", {"gateway.front": front})
        assert file.haproxy == (front == "haproxy")
        assert file.proxy_location == ("EveryNode" if file.haproxy else "Disabled")

    def test_options_win_and_leave_the_rest(self, tmp_path: Path) -> None:
        path = Path(write(tmp_path, application("{model: a, engine: {args: {seed: 1, dtype: x}}}")))
        file = load_config_file(path, {"model": "b", "engine.args.seed": 2})
        assert file.application["args"] == {
            "watch_file": str(path),
            "model": "b",
            "engine": {"args": {"seed": 2, "dtype": "x"}},
        }
        assert (file.name, file.config.model) == ("x", "b")

    def test_a_value_is_no_mapping(self) -> None:
        with pytest.raises(ConfigError, match=r"model\.x: must be a mapping"):
            load_config_file(None, {"model": "b", "model.x": 1})


class TestEnvironment:
    def test_files_stay_in_the_folder(self, tmp_path: Path) -> None:
        variables = private_environment(tmp_path, haproxy=True, given={})
        assert variables["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
        for name in ("CONFIG_FILE_LOC", "SOCKET_PATH", "SERVER_STATE_FILE", "METRICS_SOCKET_PATH"):
            assert Path(variables[f"RAY_SERVE_HAPROXY_{name}"]).is_relative_to(tmp_path)
        assert Path(variables["TMPDIR"]).is_relative_to(tmp_path)

    def test_the_run_is_marked_and_gateways_are_not_chosen_when_memory_runs_out(
        self, tmp_path: Path
    ) -> None:
        variables = private_environment(tmp_path, haproxy=False, given={})
        assert variables[RUN_VARIABLE] == str(tmp_path)
        assert variables["RAY_memory_monitor_refresh_ms"] == "0"
        assert variables["RAY_worker_oom_score_adjustment"] == "0"
        given = {"RAY_memory_monitor_refresh_ms": "250", RUN_VARIABLE: "another"}
        variables = private_environment(tmp_path, haproxy=False, given=given)
        assert "RAY_memory_monitor_refresh_ms" not in variables
        assert variables[RUN_VARIABLE] == str(tmp_path)

    def test_ray_is_private_unless_the_user_says_otherwise(self, tmp_path: Path) -> None:
        variables = private_environment(tmp_path, haproxy=False, given={})
        assert variables["RAY_AUTH_MODE"] == "token"
        assert len(variables["RAY_AUTH_TOKEN"]) == 64
        assert variables["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
        given = private_environment(tmp_path, haproxy=False, given={"RAY_AUTH_MODE": "disabled"})
        assert not given.keys() & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}


class TestProgress:
    def test_the_cause_is_the_last_exception(self) -> None:
        text = 'Retrying 5 more time(s). Error:\n  File "x.py"\nray.Err: a\nValueError: no memory\n'
        assert last_error(text + "more\n") == "ValueError: no memory"
        assert last_error("only words\n") == "only words"

    @pytest.mark.parametrize(
        ("status", "message", "cause"),
        [
            ("DEPLOYING", "", ""),
            ("DEPLOYING", "2 replicas take more than 30 s to be scheduled", ""),
            ("DEPLOYING", "A replica failed to start\nValueError: x", "ValueError: x"),
            ("DEPLOY_FAILED", "", "no reason given"),
        ],
    )
    def test_a_failed_replica_is_told_from_a_slow_one(
        self, status: str, message: str, cause: str
    ) -> None:
        assert start_failure(status, message) == cause
        assert AppState(status, message, {}).failure == cause

    def test_an_applications_failure_is_that_of_any_deployment(self) -> None:
        failed = DeploymentState(0, "ValueError: x")
        state = AppState("DEPLOYING", "", {"Engine": DeploymentState(2), "Engine-b": failed})
        assert state.failure == "ValueError: x"
        assert state.of("Engine-b") is failed
        assert state.of("Gateway") == DeploymentState()

    def test_the_engine_core_knows_better_than_its_parent(self, tmp_path: Path) -> None:
        prefix = "(EngineCore pid=7) ERROR 11-22 19:58:03 [core.py:1006] "
        (tmp_path / "worker-1.err").write_text(
            f"{prefix}Traceback\n{prefix}ValueError: no room for the KV cache\n"
            "RuntimeError: Engine core initialization failed. See root cause above.\n"
        )
        (tmp_path / "worker-0.err").write_text("RuntimeError: something else\n")
        assert engine_core_error(tmp_path) == "ValueError: no room for the KV cache"
        assert engine_core_error(None) is None

    def test_phases_come_from_the_processes(self) -> None:
        def process(pid: int, ppid: int, *line: str) -> Any:
            return SimpleNamespace(pid=pid, ppid=lambda: ppid, cmdline=lambda: list(line))

        processes = [
            process(1, 0, "ray::ServeReplica:app:Engine"),
            process(2, 0, "ray::ServeReplica:app:Engine.__init__"),
            process(3, 2, "VLLM::EngineCore"),
            process(4, 0, "ray::ServeReplica:app:Gateway"),
            process(5, 0, "ray::ServeReplica:app:Engine-b.__init__"),
        ]
        assert engine_phases(processes, "app", "Engine", 3, 0) == [
            "loading the model",
            "starting",
            "waiting for a process",
        ]
        assert engine_phases(processes, "app", "Engine", 3, 1)[:2] == ["ready", "starting"]

    def test_without_a_terminal_a_line_per_change(self) -> None:
        now_s = 0.0
        console = Console(file=None, force_terminal=False, width=200)
        display = ProgressDisplay(console, clock=lambda: now_s)
        with console.capture() as capture, display.shown():
            for now_s, phase in ((1.0, "starting"), (2.0, "starting"), (9.0, "ready")):  # noqa: B007
                display.show_phases({"engine 1": phase})
        assert capture.get() == "   1 s  engine 1 starting\n   9 s  engine 1 ready\n"
