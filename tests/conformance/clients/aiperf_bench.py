# /// script
# dependencies = ["aiperf==0.13.0"]
# ///
"""NVIDIA's AIPerf, which has taken the place of GenAI-Perf."""

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

NUM_REQUESTS, OUTPUT_LEN = 32, 16


def main(url: str, model: str, tokenizer: str) -> None:
    print(f"aiperf {version('aiperf')}")
    for endpoint in ("chat", "completions"):
        with tempfile.TemporaryDirectory() as folder:
            arguments = {
                "model": model,
                "url": url,
                "endpoint-type": endpoint,
                "tokenizer": tokenizer,  # "builtin" downloads one
                "synthetic-input-tokens-mean": 64,
                "output-tokens-mean": OUTPUT_LEN,
                "extra-inputs": "ignore_eos:true",
                "request-count": NUM_REQUESTS,
                "concurrency": 4,
                "workers-max": 1,
                "random-seed": 1,
                "ui": "none",
                "artifact-dir": folder,
            }
            command = [str(Path(sys.executable).with_name("aiperf")), "profile", "--streaming"]
            command += [
                part for key, value in arguments.items() for part in (f"--{key}", str(value))
            ]
            subprocess.run(command, check=True, stdout=sys.stderr)
            [report] = Path(folder).rglob("profile_export_aiperf.json")
            result = json.loads(report.read_text())
        assert result["request_count"]["avg"] == NUM_REQUESTS, result
        assert not result.get("error_summary"), result["error_summary"]
        speed = result["output_token_throughput"]["avg"]
        print(f"{endpoint}: {NUM_REQUESTS} streams, {speed:.0f} tokens/s")


if __name__ == "__main__":
    main(*sys.argv[1:])
