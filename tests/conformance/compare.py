"""Does Headway answer vLLM's own entrypoint tests as vLLM itself does, with the same model?

    python -m tests.conformance.compare VLLM_CHECKOUT [FILE_OR_FOLDER ...] [--tiny] [--save FILE]

Runs the tests below `tests/entrypoints` of a checkout (of the version that is installed; vLLM's
sdist has them) that talk to a server, first against plain vLLM and then against `headway serve`.
Both serve the bundled model with the same arguments, under all names that the tests ask for: what
needs another model, another argument or the network fails on both, and says nothing. With `--tiny`
that is a small random one (`tests.support.tiny_model`): much faster, and as good for all but what
asks for sense.

Prints how many passed on both, and each test that passed on one alone. `--save` keeps the results
in a file, and reports on all that it has: so the tests can be run in parts. Ends with 1 if any
passed on plain vLLM alone, with 2 if none did.

It is no test itself: it needs vLLM's tests, and takes half an hour on two cores.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from serving.planning.bundled_model import prepare_bundled_model
from tests.support.running_gateway import free_port
from tests.support.tiny_model import VOCAB_SIZE, tiny_model

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]
_START_TIMEOUT_S = 600.0
# Where a language model is what is asked for: others have tests of their own models.
_FOLDERS = ("anthropic", "cohere", "generate", "openai", "scale_out", "serve", "tool_parsers")
_ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_ENABLE_COHERE_API": "1",
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
    "enable_tokenizer_info_endpoint": True,
    "enable_server_load_tracking": True,
    "enable_scale_out": True,
    "max_logprobs": 20,
}
_TINY_MODEL_LEN = 32768  # at most, for those that ask by --args for more than the above
_NAME = re.compile(r'^ *\w*(?:MODEL|model)\w*(?:: \w+)? = "([^"]+)"', re.MULTILINE)
_NAME_OF_KIND = re.compile(r'^    "\w+": "([\w.-]+/[\w.-]+)",$', re.MULTILINE)
_STARTED_NAME = re.compile(r'RemoteOpenAIServer\(\s*"([^"]+)"')
_SERVED_NAME = re.compile(r'"--served-model-name",\s*"([^"]+)"')
_ADAPTERS = re.compile(r'"--lora-modules",\s*f?"([^"={]+)=')

Results = dict[str, tuple[str, str]]  # outcome and first line of what went wrong, by test


def main() -> int:
    options = _parser().parse_args()
    args = ENGINE_ARGS | options.args
    with tempfile.TemporaryDirectory() as folder:
        # Without what else a checkout has: its `vllm` would be imported in place of ours.
        checkout = Path(folder) / "checkout"
        checkout.mkdir()
        (checkout / "tests").symlink_to(options.checkout.resolve() / "tests")
        files = sorted(_files(checkout, options.files or _FOLDERS))
        names = sorted({name for file in files for name in _names(file)})
        if options.tiny:
            model = _tiny_model(Path(folder) / "tiny")
        else:
            model = options.model or prepare_bundled_model()
        print(f"{len(files)} files, {len(names)} names of models", flush=True)
        results: dict[str, Results] = {name: {} for name in _SERVERS}
        for name in [options.only] if options.only else _SERVERS:
            port = free_port()
            start = _SERVERS[name]
            command = start(str(model), [str(model), *names], port, args, options.replicas)
            known = _load(options.save)["plain"] | results["plain"] if options.passed else None
            wanted = _passed(known) if name == "headway" and known is not None else None
            with _running(command, port):
                results[name] = _run_tests(checkout, files, wanted, port, str(model), options)
            if options.save:
                results = _save(results, options.save)
    return _report(results["plain"], results["headway"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="a folder with vLLM's tests/")
    parser.add_argument(
        "files", nargs="*", help=f"below tests/entrypoints; default: {' '.join(_FOLDERS)}"
    )
    parser.add_argument("--tiny", action="store_true", help="a small random model, made anew")
    parser.add_argument("--model", type=Path, help="a folder; default: the bundled model")
    parser.add_argument("--args", type=json.loads, default={}, help="vLLM's, as a JSON object")
    parser.add_argument("--replicas", type=int, default=1, help="engines of Headway")
    parser.add_argument("--timeout-s", type=float, default=60.0, help="of each test")
    parser.add_argument("--only", choices=_SERVERS, help="one of the two, for a part of --save")
    parser.add_argument("--passed", action="store_true", help="Headway: what passed on vLLM")
    parser.add_argument("--limit-s", type=float, help="of all tests on one server; others wait")
    parser.add_argument("--save", type=Path, help="a file that results are added to")
    return parser


def _files(checkout: Path, wanted: Sequence[str]) -> Iterator[Path]:
    """Yield the test files that talk to a server."""
    for place in [checkout / "tests" / "entrypoints" / name for name in wanted]:
        found = [place] if place.is_file() else place.rglob("test_*.py")
        yield from (file for file in found if any("RemoteOpenAIServer" in t for t in _texts(file)))


def _texts(file: Path) -> Iterator[str]:
    """Yield what a test file and the fixtures beside it say."""
    for each in (file, file.with_name("conftest.py")):
        if each.exists():
            yield each.read_text()


def _names(file: Path) -> set[str]:
    patterns = (_NAME, _NAME_OF_KIND, _STARTED_NAME, _SERVED_NAME, _ADAPTERS)
    return {name for text in _texts(file) for each in patterns for name in each.findall(text)}


def _tiny_model(folder: Path) -> Path:
    """Return the small random model, whose replies end: every 64th token is an end to it."""
    tiny_model(folder, max_position_embeddings=_TINY_MODEL_LEN)
    ends = {"eos_token_id": [*range(2, VOCAB_SIZE, 64)]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return folder


def _plain_command(
    model: str, names: list[str], port: int, args: dict[str, Any], replicas: int
) -> list[str]:
    said = json.dumps({"model": model, "names": names, "port": port, "args": args})
    return [sys.executable, "-m", "tests.conformance.plain_server", said]


def _headway_command(
    model: str, names: list[str], port: int, args: dict[str, Any], replicas: int
) -> list[str]:
    settings = {
        "model": json.dumps(model),
        "served_model_name": json.dumps(names),
        "engine.args": json.dumps(args),
    }
    return [
        str(Path(sys.executable).parent / "headway"),
        *("serve", "--device", "cpu", "--port", str(port), "--replicas", str(replicas)),
        *(part for key, value in settings.items() for part in ("--set", f"{key}={value}")),
    ]


_SERVERS = {"plain": _plain_command, "headway": _headway_command}


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
    checkout: Path,
    files: list[Path],
    wanted: set[str] | None,
    port: int,
    model: str,
    options: argparse.Namespace,
) -> Results:
    """Run them, or those wanted of them, against the server at this port."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        environment = {
            **os.environ,
            **_ENVIRONMENT,
            "PYTHONPATH": f"{checkout}{os.pathsep}{_HERE}",
            "CONFORMANCE_PORT": str(port),
            "CONFORMANCE_MODEL": model,
        }
        if wanted is not None:
            (Path(folder) / "wanted.json").write_text(json.dumps(sorted(wanted)))
            environment["CONFORMANCE_WANTED"] = str(Path(folder) / "wanted.json")
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "pytest", "-q", "-p", "shared_server", "--tb=line"),
                *("-p", "no:cacheprovider", "-o", "addopts=", "--rootdir", str(checkout)),
                *("--asyncio-mode=auto", f"--timeout={options.timeout_s}"),
                *(f"--junitxml={report}", "--continue-on-collection-errors"),
                *map(str, files),
            ],
            cwd=checkout,
            env=environment,
            start_new_session=True,
        )
        try:
            process.wait(options.limit_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # it still reports what it has done
            process.wait(180)
        finally:
            process.kill()
        if not report.exists():
            raise SystemExit("pytest wrote no report")
        return dict(_read_report(report))


def _read_report(report: Path) -> Iterator[tuple[str, tuple[str, str]]]:
    for case in ET.parse(report).iter("testcase"):
        if case.get("name") is None:  # pytest was interrupted
            continue
        fault = next((each for each in case if each.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if fault is None else fault.tag
        why = "" if fault is None else (fault.get("message") or "").partition("\n")[0]
        yield f"{case.get('classname')}::{case.get('name')}", (outcome, why[:160])


def _load(file: Path | None) -> dict[str, Results]:
    """Return the results in a file, none if there is none."""
    kept = json.loads(file.read_text()) if file and file.exists() else {}
    return {name: kept.get(name, {}) for name in _SERVERS}


def _save(results: dict[str, Results], file: Path) -> dict[str, Results]:
    """Add results to those in the file, and return all."""
    every = {name: kept | results[name] for name, kept in _load(file).items()}
    file.write_text(json.dumps(every, indent=1))
    return every


def _passed(results: Results) -> set[str]:
    return {name for name, (outcome, _) in results.items() if outcome == "passed"}


def _report(plain: Results, headway: Results) -> int:
    """Print what differs, and how much does not."""
    passed_plain, passed_headway = _passed(plain), _passed(headway)
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
