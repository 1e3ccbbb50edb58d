"""Recorded runs: read, replayed, fitted on one half and judged on the other."""

import gzip
import json
import random
from pathlib import Path

import pytest

from benchmarks.fidelity.recorded_runs import fit_profile, judge, replay, start_profile
from benchmarks.fidelity.vllm_run import RecordedRequest, VllmRun, split_requests

_TRUTH = {
    "base_s": 0.02,
    "s_per_token": 4e-5,
    "s_per_decode_req": 0.0,
    "s_per_context_token": 2e-7,
}


def make_run() -> VllmRun:
    """Return a run of an engine with known terms, made by replaying its requests."""
    rng = random.Random(0)
    requests, now_s = [], 0.0
    for number in range(40):
        now_s += rng.expovariate(4.0)
        sizes = rng.randint(50, 1500), rng.randint(2, 120)
        requests.append(RecordedRequest(f"r{number}", *sizes, now_s - 0.0, 0.0, 0.0))
    first_s = requests[0].arrival_s
    requests = [
        RecordedRequest(
            r.id, r.num_prompt_tokens, r.num_output_tokens, r.arrival_s - first_s, 0.0, 0.0
        )
        for r in requests
    ]
    run = VllmRun("test", "none", "0", 16, 512, 20_000, 16, tuple(requests))
    times, _ = replay(run, start_profile(run).model_copy(update=_TRUTH))
    done = tuple(
        RecordedRequest(
            r.id,
            r.num_prompt_tokens,
            r.num_output_tokens,
            r.arrival_s,
            r.arrival_s + times[r.id].ttft_s,
            r.arrival_s + times[r.id].latency_s,
        )
        for r in requests
    )
    return VllmRun("test", "none", "0", 16, 512, 20_000, 16, done)


def write(run: VllmRun, folder: Path, num_gpu_blocks: int | None) -> Path:
    meta = {
        "model": run.model,
        "vllm_version": run.vllm_version,
        "engine_kwargs": {
            "max_num_seqs": 8,
            "max_num_batched_tokens": run.max_num_batched_tokens,
        },
    }
    if num_gpu_blocks:
        meta["kv_cache"] = {"num_gpu_blocks": num_gpu_blocks, "block_size": run.block_size}
    rows = [
        {
            "request_id": r.id,
            "input_toks": r.num_prompt_tokens,
            "output_toks": r.num_output_tokens,
            "queued_ts": 1000 + r.arrival_s,
            "first_token_ts": 1000 + r.first_token_s,
            "last_token_ts": 1000 + r.last_token_s,
        }
        for r in reversed(run.requests)
    ]
    series = "t,running,waiting,kv_cache_pct\n1.0,16,2,10.0\n2.0,3,0,1.0\n"
    path = folder / "test_requests.jsonl.gz"
    for name, text in (
        ("test_meta.json.gz", json.dumps(meta)),
        (path.name, "\n".join(map(json.dumps, rows))),
        ("test_timeseries.csv.gz", series),
    ):
        (folder / name).write_bytes(gzip.compress(text.encode()))
    return path


def test_reads_what_was_recorded(tmp_path: Path) -> None:
    run = make_run()
    found = VllmRun.load(write(run, tmp_path, num_gpu_blocks=1251))
    assert (found.num_kv_tokens, found.block_size) == (20_000, 16)
    assert found.max_num_seqs == 16  # so many ran, whatever the file says
    assert [r.id for r in found.requests] == [r.id for r in run.requests]
    assert found.requests[5].ttft_s == pytest.approx(run.requests[5].ttft_s)
    longest = max(r.num_prompt_tokens + r.num_output_tokens for r in run.requests)
    assert VllmRun.load(write(run, tmp_path, None)).num_kv_tokens == 16 * longest


def test_halves_share_nothing() -> None:
    fitted_on, judged_on = split_requests(make_run())
    assert len(fitted_on) == len(judged_on) == 20
    assert not fitted_on & judged_on


def test_fits_one_half_and_predicts_the_other() -> None:
    run = make_run()
    fitted_on, judged_on = split_requests(run)
    result = judge(run, fit_profile(run, fitted_on), judged_on)
    assert result["num_requests"] == 20
    for name in ("ttft_s", "latency_s"):
        assert result[name]["measured"] > 0.05
        assert abs(result[name]["error"]) < 0.03, result
    # The start of the search is not yet the answer.
    assert abs(judge(run, start_profile(run), judged_on)["latency_s"]["error"]) > 0.1
