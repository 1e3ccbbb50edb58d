"""vLLM's own serving benchmark: `vllm bench serve`, of the vLLM that is installed."""

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path

NUM_PROMPTS, INPUT_LEN, OUTPUT_LEN = 32, 64, 16


def main(url: str, model: str, tokenizer: str) -> None:
    # vLLM's command does not start in its build for CPUs; what it runs does.
    import vllm
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as run
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    print(f"vllm bench serve {vllm.__version__}")
    parser: argparse.ArgumentParser = FlexibleArgumentParser()
    add_cli_args(parser)
    for backend, endpoint in (("openai", "completions"), ("openai-chat", "chat/completions")):
        with tempfile.TemporaryDirectory() as folder:
            arguments = {
                "backend": backend,
                "base-url": url,
                "endpoint": f"/v1/{endpoint}",
                "served-model-name": model,
                "model": tokenizer,
                "dataset-name": "random",
                "random-input-len": INPUT_LEN,
                "random-output-len": OUTPUT_LEN,
                "num-prompts": NUM_PROMPTS,
                "max-concurrency": 8,
                "result-dir": folder,
                "result-filename": "result.json",
            }
            flags = [part for key, value in arguments.items() for part in (f"--{key}", str(value))]
            flags += ["--ignore-eos", "--save-result", "--disable-tqdm"]
            with contextlib.redirect_stdout(sys.stderr):
                run(parser.parse_args(flags))
            result = json.loads((Path(folder) / "result.json").read_text())
        assert result["completed"] == NUM_PROMPTS, result
        assert result["total_output_tokens"] == NUM_PROMPTS * OUTPUT_LEN, result
        print(f"{endpoint}: {NUM_PROMPTS} requests, {result['output_throughput']:.0f} tokens/s")


if __name__ == "__main__":
    main(*sys.argv[1:])
