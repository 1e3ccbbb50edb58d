"""A newcomer's mistakes end at once, with one line that names the mend; and the rest of a start."""

import os
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.planning.fake_hub import GATED, fake_hub

ROOT = Path(__file__).parents[3]
MAX_CPU_S = 10.0  # waiting takes nobody long here; on an idle machine what computes is what lasts


@pytest.fixture(scope="module")
def hub_url() -> Iterator[str]:
    with fake_hub() as hub:
        yield hub.url


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def serve(folder: Path, hub_url: str, *arguments: str) -> tuple[int, str, float]:
    """Run `headway serve`; return exit code, stderr and seconds of CPU."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub_url, "HF_HOME": str(folder), "PYTHONPATH": str(ROOT)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "serving.cli.main", "serve", "--device", "cpu", *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=100,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.returncode, done.stderr, cpu_s


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--max-modellen", "8k"], 2, r"--max-modellen: no such option.*mean --max-model-len\?"),
        (["acme/wrong"], 2, r"model: the Hugging Face hub has no acme/wrong.*check the name"),
        ([GATED], 2, rf"model: {GATED} is gated: accept its terms at .*set HF_TOKEN to a token"),
        (["--port", "BUSY"], 1, r"cannot listen on .*choose another with --port"),
        (["--replicas", "500"], 2, r"replicas: not enough memory: .*: lower it, or free memory"),
    ],
    ids=["wrong flag", "wrong model id", "no token", "port in use", "too little memory"],
)
def test_five_mistakes(
    tmp_path: Path, hub_url: str, busy_port: int, arguments: list[str], code: int, message: str
) -> None:
    arguments = [str(busy_port) if each == "BUSY" else each for each in arguments]
    returncode, stderr, cpu_s = serve(tmp_path, hub_url, *arguments)
    assert returncode == code, stderr
    assert len(stderr.splitlines()) == 1, stderr
    assert re.search(message, stderr)
    assert cpu_s < MAX_CPU_S
