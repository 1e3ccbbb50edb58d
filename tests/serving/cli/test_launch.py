"""Nothing is left behind by a launch."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[3]
START_TIMEOUT_S = 150  # of a stand-in; 15 on two idle cores

STAND_IN = """
import http.server, subprocess, sys, threading
from rich.console import Console
from serving.gateway.http.endpoint import StartError
from serving.planning.hardware import detect_hardware
from serving.cli.launch import launch
from serving.cli.config_file import load_config_file
from serving.planning.service.service_plan import plan_service

port, fails = int(sys.argv[1]), sys.argv[2] == "fails"

def build(args):
    from ray import serve

    class Engine:
        def __init__(self):
            if fails:
                raise ValueError("the engine has no memory")

    class Gateway:
        def __init__(self, engines):
            class Handler(http.server.BaseHTTPRequestHandler):
                def do_GET(self):
                    self.send_response(200)
                    self.end_headers()
            http.server.HTTPServer.allow_reuse_port = True  # the launcher reserves the port
            server = http.server.HTTPServer(("127.0.0.1", port), Handler)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            subprocess.Popen(["sleep", "1000"], start_new_session=True)  # will not leave by itself

    options = {"num_cpus": 0.1}
    engines = serve.deployment(name="Engine", num_replicas=2, ray_actor_options=options)(Engine)
    gateway = serve.deployment(name="Gateway", ray_actor_options=options)(Gateway)
    return gateway.bind(engines.bind())

file = load_config_file(None, {"port": port, "engine.factory": "none:NullEngine", "device": "cpu"})
hardware = detect_hardware()
try:
    plan = plan_service(file.config, hardware)
    sys.exit(launch(file, plan, hardware, Console(width=200), build=build))
except StartError as error:
    sys.exit(f"headway: {error}")
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Start the stand-in as a process of its own; ends it if the test did not."""
    started: list[psutil.Popen] = []

    def go(port: int, behaviour: str) -> psutil.Popen:
        script = tmp_path / "stand_in.py"
        script.write_text(STAND_IN)
        process = psutil.Popen(
            [sys.executable, "-u", str(script), str(port), behaviour],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
        started.append(process)
        return process

    yield go
    for process in started:
        if process.poll() is None:
            process.kill()


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.timeout(START_TIMEOUT_S + 60)
def test_a_launch_leaves_nothing_behind(start: Any, port: int) -> None:
    launched = start(port, "serves")
    lines = []
    for line in launched.stdout:
        lines.append(line)
        if line.startswith("Ctrl-C"):
            break
    text = "".join(lines)
    assert f"curl http://127.0.0.1:{port}/v1/chat/completions" in text
    assert "engine 1 ready, engine 2 ready" in text
    children = launched.children(recursive=True)
    assert len(children) > 5
    folders = set(re.findall(r"/\S*?/headway-\w+", " ".join(children[0].cmdline())))
    assert len(folders) == 1
    # As a terminal does: to the whole process group.
    os.killpg(launched.pid, signal.SIGINT)
    rest = launched.stdout.read()
    assert launched.wait(30) == 0, rest
    assert "draining" in rest
    assert "Traceback" not in text + rest
    assert not [child for child in children if child.is_running()]
    assert is_free(port)
    assert not any(Path(folder).exists() for folder in folders)


@pytest.mark.timeout(START_TIMEOUT_S)
def test_an_engine_that_cannot_start_ends_the_launch(start: Any, port: int) -> None:
    launched = start(port, "fails")
    text = launched.stdout.read()
    assert launched.wait(30) == 1
    assert text.splitlines()[-1] == "headway: cannot start: ValueError: the engine has no memory"
    assert "Traceback" not in text
    assert is_free(port)
