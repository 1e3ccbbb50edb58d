"""Do the clients that people have get what they ask a running service for?

    python -m tests.conformance.clients URL [CLIENT ...] [--model NAME]

Runs the scripts beside this file, each with the version of its client that it names, in an
environment of its own that uv makes and keeps: they do not fit together in one. Prints a line for
each, and ends with 1 if one failed. The service has to serve a chat model that ends the JSON that
it is made to write, as the bundled one does and a random one does not, and have it call tools as
they are declared:

    headway serve --enable-auto-tool-choice --tool-call-parser hermes --tool-strict-level parameter

It is no test itself: it needs a service, and packages that are no part of `make install`.
"""

import argparse
import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

_HERE = Path(__file__).parent
_SCRIPTS = {path.stem: path for path in sorted(_HERE.glob("[!_]*.py"))}
_IN_OURS = "vllm_bench"  # of what is installed here
_TIMEOUT_S = 600.0  # of one, with what it has to install


def main() -> int:
    options = _parser().parse_args()
    url = options.url.rstrip("/").removesuffix("/v1")
    cards = _cards(url)
    model = options.model or next(iter(cards), "")
    if model not in cards:
        raise SystemExit(f"{url} has no model {model}; it has: {', '.join(cards)}")
    tokenizer = options.tokenizer or cards[model]
    failed = []
    for name in options.clients or _SCRIPTS:
        start_s = time.monotonic()
        done, said = _run(name, url, model, tokenizer)
        verdict = "ok" if done else "FAILED"
        print(f"{name}: {verdict} in {time.monotonic() - start_s:.0f} s: {said}", flush=True)
        failed += [] if done else [name]
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url", help="where the service answers, as http://127.0.0.1:8000")
    parser.add_argument(
        "clients",
        nargs="*",
        choices=[[], *_SCRIPTS],
        metavar="CLIENT",
        help=f"of {', '.join(_SCRIPTS)}; default: all",
    )
    parser.add_argument("--model", help="default: the first that the service names")
    parser.add_argument("--tokenizer", help="of benchmarks; default: the model's own folder")
    return parser


def _cards(url: str) -> dict[str, str]:
    """Return what the service names its models, and where their tokenizers are."""
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as reply:
            return {card["id"]: card["root"] for card in json.load(reply)["data"]}
    except OSError as error:
        raise SystemExit(f"{url} does not answer: {error}") from None


def _run(name: str, url: str, model: str, tokenizer: str) -> tuple[bool, str]:
    """Return whether all was as it should be, and what was done or what was not."""
    bin_ = Path(sys.executable).parent
    how = (
        [sys.executable]
        if name == _IN_OURS
        else [str(bin_ / "uv"), "run", "--quiet", "--python", sys.executable, "--script"]
    )
    try:
        ended = subprocess.run(
            [*how, str(_SCRIPTS[name]), url, model, tokenizer],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False, f"not done within {_TIMEOUT_S:.0f} s"
    if ended.returncode == 0:
        return True, "; ".join(ended.stdout.split("\n")).strip("; ")
    return False, "\n".join(f"{ended.stdout}\n{ended.stderr}".strip().splitlines()[-15:])


if __name__ == "__main__":
    sys.exit(main())
