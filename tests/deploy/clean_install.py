"""Does the wheel serve from a clean virtual environment, in any folder?

    python -m tests.deploy.clean_install cpu      (`make check-install ARGS=cpu`; minutes, 3 GB)

`headway[cpu]` or `[emulate]` is installed from a wheel as docs/cli.md says, but by uv, which takes
seconds where pip takes minutes; then `headway serve` is started elsewhere, asked once, and stopped.
Of `gpu` what would be installed is resolved, and nothing more.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from deploy.install import TORCH_CPU_INDEX, find_torch_wheel, pip_settings
from tests.deploy.built_wheel import build_wheel, copy_checkout
from tests.deploy.compiled_core import ROOT
from tests.support.running_gateway import free_port

_START_S = 240.0
_STOP_S = 60.0
_SERVE = {
    "cpu": ("--replicas", "1"),
    "emulate": ("emulated8.yaml",),
}
_UV = Path(sys.executable).with_name("uv")


def main(extra: str) -> None:
    """Install, serve, ask and stop; raise `AssertionError` with what was said where one fails."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        wheel, _ = build_wheel(copy_checkout(root / "checkout"), CC="no-such-compiler")
        venv, wanted = root / "venv", f"headway[{extra}] @ {wheel.as_uri()}"
        _run("making a venv", [sys.executable, "-m", "venv", str(venv)], root)
        if extra == "gpu":
            said = _run("resolving", [*_install(venv, ()), "--dry-run", wanted], root)
            assert "vllm==0.32.0" in said.replace(" + ", "\n"), said
            return
        _run("installing", [*_install(venv, _indices(extra)), wanted], root)
        if extra == "cpu":
            # Those of PyPI cannot be imported beside a CPU build of torch: `headway serve` says it.
            unwanted = ("torchvision", "torchaudio", "torchcodec")
            python = str(venv / "bin" / "python")
            _run(
                "uninstalling", [str(_UV), "pip", "uninstall", "--python", python, *unwanted], root
            )
        elsewhere = root / "elsewhere"
        elsewhere.mkdir()
        _serve(venv, elsewhere, _SERVE[extra])


def _install(venv: Path, indices: Sequence[str]) -> list[str]:
    python = str(venv / "bin" / "python")
    return [str(_UV), "pip", "install", "--python", python, *indices]


def _indices(extra: str) -> tuple[str, ...]:
    """Return where PyTorch's CPU build is found: on this disk, or on its own index."""
    if extra != "cpu":
        return ()
    [version] = [
        line.split("==")[1].strip()
        for line in (ROOT / "deploy" / "locks" / "cpu.txt").read_text().splitlines()
        if line.startswith("torch==")
    ]
    if (links := find_torch_wheel(version, pip_settings("find-links"))) is not None:
        return ("--find-links", str(links))
    return ("--extra-index-url", TORCH_CPU_INDEX, "--index-strategy", "unsafe-best-match")


def _serve(venv: Path, folder: Path, arguments: Sequence[str]) -> None:
    headway, port, log = str(venv / "bin" / "headway"), free_port(), folder / "log"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if arguments[0].endswith(".yaml"):
        sample = arguments[0].removesuffix(".yaml")
        text = _run("taking a sample", [headway, "config", "sample", sample], folder)
        (folder / arguments[0]).write_text(text)
    began_s = time.monotonic()
    with log.open("w") as output:
        served = subprocess.Popen(
            [headway, "serve", *arguments, "--port", str(port)],
            cwd=folder,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while "\nready after " not in log.read_text():
            assert served.poll() is None, log.read_text()
            assert time.monotonic() - began_s < _START_S, log.read_text()
            time.sleep(0.2)
        print(f"ready after {time.monotonic() - began_s:.0f} s", flush=True)
        print(f"it says: {_ask(port)!r}", flush=True)
    finally:
        if served.poll() is None:
            os.killpg(served.pid, signal.SIGINT)
        code = served.wait(_STOP_S)
    assert code in (0, 130), f"it ended with {code}\n{log.read_text()}"


def _ask(port: int) -> str:
    body = {
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 16,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode()
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as reply:
        return json.load(reply)["choices"][0]["message"]["content"]


def _run(what: str, command: Sequence[str], folder: Path) -> str:
    """Run a command and return its output; what it said otherwise is shown where it fails."""
    began_s = time.monotonic()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{what}: {done.stdout}{done.stderr}"
    print(f"{what} took {time.monotonic() - began_s:.0f} s", flush=True)
    return done.stdout + done.stderr if "--dry-run" in command else done.stdout


if __name__ == "__main__":
    main(sys.argv[1])
