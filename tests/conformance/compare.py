"""Does Headway answer vLLM's own entrypoint tests as vLLM itself does, with the same model?

    python -m tests.conformance.compare VLLM_CHECKOUT [FILE_OR_FOLDER ...] [--replicas N]

Runs the tests below `tests/entrypoints` of a checkout (of the version that is installed) that talk
to a server, first against plain vLLM and then against `headway serve`. Both serve the bundled model
with the same arguments, under all names that the tests ask for: what needs another model, another
argument or the network fails on both, and says nothing. With `--model` a small random one
(`tests.support.tiny_model`) is much faster, and as good for all but what asks for sense.

Prints how many passed on both, and each test that passed on one alone. Ends with 1 if any passed on
plain vLLM alone, with 2 if none did.

It is no test itself: it needs vLLM's tests, and takes an hour on two cores.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from serving.planning.bundled_model import prepare_bundled_model
from tests.support.running_gateway import free_port

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]
_START_TIMEOUT_S = 600.0
_ENVIRONMENT = {
    "VLLM_ENABLE_RESPONSES_API_STORE": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
ENGINE_ARGS = {
    "max_model_len": 2048,
    "enforce_eager": True,
    "enable_auto_tool_choice": True,
    "tool_call_parser": "hermes",
    "enable_prompt_tokens_details": True,
    "max_logprobs": 20,
}
# Of vLLM's own server, in whose place the gateway stands: Headway refuses them.
PLAIN_ARGS = {"enable_tokenizer_info_endpoint": True, "enable_server_load_tracking": True}
_NAME = re.compile(r'^[A-Z_]*MODEL[A-Z_]*\s*(?::\s*\w+\s*)?=\s*"([^"]+)"', re.MULTILINE)
_SERVED_NAME = re.compile(r'"--served-model-name",\s*"([^"]+)"')

Results = dict[str, tuple[str, str]]  # outcome and first line of what went wrong, by test


def main() -> int:
    options = _parser().parse_args()
    checkout = options.checkout.resolve()
    files = sorted(_files(checkout, options.files))
    names = sorted({name for file in files for name in _names(file.read_text())})
    model = str(options.model or prepare_bundled_model())
    print(f"{len(files)} files, {len(names)} names of models", flush=True)
    results = []
    for start in (_plain_command, _headway_command):
        port = free_port()
        with _running(start(model, [model, *names], port, options.replicas), port):
            results.append(_run_tests(checkout, files, port, model, options.timeout_s))
    return _report(*results)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="a folder with vLLM's tests/")
    parser.add_argument("files", nargs="*", help="below tests/entrypoints; default: all")
    parser.add_argument("--model", type=Path, help="a folder; default: the bundled model")
    parser.add_argument("--replicas", type=int, default=1, help="engines of Headway")
    parser.add_argument("--timeout-s", type=float, default=60.0, help="of each test")
    return parser


def _files(checkout: Path, wanted: list[str]) -> Iterator[Path]:
    """Yield the test files that talk to a server."""
    folder = checkout / "tests" / "entrypoints"
    for place in [folder / name for name in wanted] or [folder]:
        found = [place] if place.is_file() else place.rglob("test_*.py")
        yield from (file for file in found if "RemoteOpenAIServer" in file.read_text())


def _names(text: str) -> set[str]:
    return set(_NAME.findall(text)) | set(_SERVED_NAME.findall(text))


def _plain_command(model: str, names: list[str], port: int, replicas: int) -> list[str]:
    said = json.dumps(
        {"model": model, "names": names, "port": port, "args": ENGINE_ARGS | PLAIN_ARGS}
    )
    return [sys.executable, "-m", "tests.conformance.plain_server", said]


def _headway_command(model: str, names: list[str], port: int, replicas: int) -> list[str]:
    settings = {
        "model": json.dumps(model),
        "served_model_name": json.dumps(names),
        "engine.args": json.dumps(ENGINE_ARGS),
    }
    return [
        str(Path(sys.executable).parent / "headway"),
        *("serve", "--device", "cpu", "--port", str(port), "--replicas", str(replicas)),
        *(part for key, value in settings.items() for part in ("--set", f"{key}={value}")),
    ]


@contextmanager
def _running(command: list[str], port: int) -> Iterator[None]:
    """Keep a server running, from when it answers."""
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        process = subprocess.Popen(
            command,
            cwd=_ROOT,
            env={**os.environ, **_ENVIRONMENT},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            deadline_s = time.monotonic() + _START_TIMEOUT_S
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > deadline_s:
                    raise SystemExit(f"it did not start:\n{Path(log.name).read_text()[-4000:]}")
                time.sleep(0.5)
            yield
        finally:
            process.terminate()
            process.wait(120)
            with suppress(ProcessLookupError):  # vLLM's engine core may outlive its parent
                os.killpg(process.pid, signal.SIGKILL)


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _run_tests(
    checkout: Path, files: list[Path], port: int, model: str, timeout_s: float
) -> Results:
    """Run them against the server at this port."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        environment = {
            **os.environ,
            **_ENVIRONMENT,
            "PYTHONPATH": f"{checkout}{os.pathsep}{_HERE}",
            "CONFORMANCE_PORT": str(port),
            "CONFORMANCE_MODEL": model,
        }
        subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "-p", "shared_server", "--tb=line"),
                *("-p", "no:cacheprovider", "-o", "addopts=", "--rootdir", str(checkout)),
                *("--asyncio-mode=auto", f"--timeout={timeout_s}", f"--junitxml={report}"),
                "--continue-on-collection-errors",
                *map(str, files),
            ],
            cwd=checkout,
            env=environment,
            check=False,
        )
        if not report.exists():
            raise SystemExit("pytest wrote no report")
        return dict(_read_report(report))


def _read_report(report: Path) -> Iterator[tuple[str, tuple[str, str]]]:
    for case in ET.parse(report).iter("testcase"):
        fault = next((each for each in case if each.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if fault is None else fault.tag
        why = "" if fault is None else (fault.get("message") or "").partition("\n")[0]
        yield f"{case.get('classname')}::{case.get('name')}", (outcome, why[:160])


def _report(plain: Results, headway: Results) -> int:
    """Print what differs, and how much does not."""
    passed_plain = {name for name, (outcome, _) in plain.items() if outcome == "passed"}
    passed_headway = {name for name, (outcome, _) in headway.items() if outcome == "passed"}
    only_plain, only_headway = passed_plain - passed_headway, passed_headway - passed_plain
    for name in sorted(only_plain):
        print(f"only plain vLLM: {name}: {headway.get(name, ('', 'did not run'))[1]}")
    for name in sorted(only_headway):
        print(f"only Headway: {name}: {plain.get(name, ('', 'did not run'))[1]}")
    num_others = len(plain.keys() | headway.keys()) - len(passed_plain | passed_headway)
    print(
        f"passed on both: {len(passed_plain & passed_headway)}; on plain vLLM alone: "
        f"{len(only_plain)}; on Headway alone: {len(only_headway)}; on neither: {num_others}"
    )
    if not passed_plain:
        return 2
    return 1 if only_plain else 0


if __name__ == "__main__":
    sys.exit(main())
