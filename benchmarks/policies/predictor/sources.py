"""Which prompts with known lengths of answers are there? Files as docs/predictor.md names them."""

import gzip
import json
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from router import Request
from serving.gateway.intake.length.wording import instruction_features

INSTRUCTIONS = "instruction_prompts_output_lengths*"  # those that the shipped weights come from
CONVERSATIONS = "sharegpt_multiturn*"
LICENCES = {
    "gpteacher-codegen": "teknium1/GPTeacher, MIT",
    "gpteacher-roleplay": "teknium1/GPTeacher, MIT",
    "alpaca-gpt4-demo": "hiyouga/LLaMA-Factory alpaca_en_demo, Apache-2.0",
}


@dataclass(frozen=True)
class Example:
    """A prompt, as the router sees it, and the length of its answer in tokens."""

    source: str
    prompt: str
    num_prompt_tokens: int
    num_output_tokens: int
    wording: tuple[int, ...]

    def request(self, number: int = 0, model: str = "m") -> Request:
        return Request(
            id=str(number),
            model=model,
            num_prompt_tokens=self.num_prompt_tokens,
            wording=self.wording,
        )


def read_examples(folder: Path, pattern: str, source: str = "") -> list[Example]:
    """Return the examples of the first file of that name; none without one."""
    file = next((each for each in sorted(folder.iterdir()) if fnmatch(each.name, pattern)), None)
    if file is None:
        return []
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [
        Example(
            row.get("source", source),
            row["prompt"],
            row["input_tokens"],
            max(1, row["output_tokens"]),
            tuple(sorted(instruction_features(row["prompt"]))),
        )
        for row in rows
    ]


def logs(examples: list[Example]) -> np.ndarray:
    """Return log(tokens) of the answers, [num_examples]."""
    return np.log([each.num_output_tokens for each in examples])


def made_up(num_examples: int, seed: int) -> list[Example]:
    """Return prompts whose answers are as long as their wording says, and noise. For tests."""
    rng = np.random.default_rng(seed)
    kinds = (
        ("Write a one-sentence summary of {}", 25.0),
        ("Write a comprehensive report on {}", 900.0),
        ("What is the capital of {}?", 8.0),
        ("Explain how {} works", 300.0),
        ("Give me 3 examples of {}", 120.0),
    )
    found = []
    for _ in range(num_examples):
        text, middle = kinds[rng.integers(len(kinds))]
        prompt = text.format(f"thing{rng.integers(1000)} of {rng.integers(50)}")
        length = max(1, round(middle * float(np.exp(0.4 * rng.standard_normal()))))
        wording = tuple(sorted(instruction_features(prompt)))
        found.append(Example("made up", prompt, len(prompt) // 4, length, wording))
    return found
