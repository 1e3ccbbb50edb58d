"""What happened in a recorded run of one vLLM engine? Its settings and each request's times.

The files are those of LLMServingSim's bench (casys-kaist, MIT): `NAME_meta.json.gz`,
`NAME_requests.jsonl.gz` (times of vLLM's own engine core) and `NAME_timeseries.csv.gz` (each
second).
"""

import csv
import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    """One request. Times are seconds from the first request of the run."""

    id: str
    num_prompt_tokens: int
    num_output_tokens: int
    arrival_s: float
    first_token_s: float
    last_token_s: float

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.arrival_s

    @property
    def latency_s(self) -> float:
        return self.last_token_s - self.arrival_s


@dataclass(frozen=True, slots=True)
class VllmRun:
    """One recorded run."""

    name: str
    model: str
    vllm_version: str
    max_num_seqs: int
    max_num_batched_tokens: int
    num_kv_tokens: int  # if the run does not tell: so many that they never are the limit
    block_size: int
    requests: tuple[RecordedRequest, ...]  # in order of arrival

    @classmethod
    def load(cls, requests: Path) -> "VllmRun":
        """Read the run of a `…_requests.jsonl.gz` and the files beside it."""
        name = requests.name.removesuffix("_requests.jsonl.gz")
        with gzip.open(requests.with_name(f"{name}_meta.json.gz"), "rt") as file:
            meta = json.load(file)
        with gzip.open(requests, "rt") as file:
            rows = [json.loads(line) for line in file]
        with gzip.open(requests.with_name(f"{name}_timeseries.csv.gz"), "rt") as file:
            most_running = max(int(row["running"]) for row in csv.DictReader(file))
        start_s = min(row["queued_ts"] for row in rows)
        found = sorted(
            (
                RecordedRequest(
                    id=row["request_id"],
                    num_prompt_tokens=row["input_toks"],
                    num_output_tokens=row["output_toks"],
                    arrival_s=row["queued_ts"] - start_s,
                    first_token_s=row["first_token_ts"] - start_s,
                    last_token_s=row["last_token_ts"] - start_s,
                )
                for row in rows
            ),
            key=lambda request: request.arrival_s,
        )
        cache: dict[str, Any] = meta.get("kv_cache") or {}
        block_size = cache.get("block_size") or 16
        # One of the published files names fewer sequences than its engine ran.
        max_num_seqs = max(meta["engine_kwargs"]["max_num_seqs"], most_running)
        longest = max(each.num_prompt_tokens + each.num_output_tokens for each in found)
        num_kv_tokens = max_num_seqs * longest
        if cache.get("num_gpu_blocks"):
            num_kv_tokens = (cache["num_gpu_blocks"] - 1) * block_size  # one is vLLM's own
        return cls(
            name=name,
            model=meta["model"],
            vllm_version=meta["vllm_version"],
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=meta["engine_kwargs"]["max_num_batched_tokens"],
            num_kv_tokens=num_kv_tokens,
            block_size=block_size,
            requests=tuple(found),
        )


def split_requests(run: VllmRun) -> tuple[frozenset[str], frozenset[str]]:
    """Return the ids to fit on and the ids to judge on: every second request each."""
    ids = [request.id for request in run.requests]
    return frozenset(ids[::2]), frozenset(ids[1::2])
