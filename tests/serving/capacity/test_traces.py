"""Readers of traces, on small files of our own in the public formats."""

import gzip
import json

import numpy as np
import pytest

from serving.capacity.traces import TraceError, read_trace


def lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def sizes(workload):
    return [(each.num_prompt_tokens, each.num_output_tokens) for each in workload.arrivals]


def test_azure(tmp_path):
    """Azure's columns and dates of seven decimals; the first request comes at 0 s."""
    path = tmp_path / "AzureLLMInferenceTrace_code.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,396,109\n"
        "2023-11-16 18:16:46.6805900,879,55\n"
    )
    workload = read_trace(path)
    assert workload.name == "AzureLLMInferenceTrace_code"
    assert sizes(workload) == [(374, 44), (396, 109), (879, 55)]
    offsets_s = [each.offset_s for each in workload.arrivals]
    assert offsets_s == pytest.approx([0.0, 4.314579, 60.0], abs=1e-6)


def test_servegen(tmp_path):
    """Seconds, a client per request who becomes the tenant, packed; lines out of order."""
    path = tmp_path / "servegen.csv.gz"
    with gzip.open(path, "wt") as file:
        file.write("arrival_s,client,input_tokens,output_tokens,reason_ratio\n")
        file.write("2.5,19,7551,100,0.8\n0.5,3,212,1570,0.9\n3.0,3,5,0,0.0\n")
    workload = read_trace(path)
    assert workload.name == "servegen"
    assert sizes(workload) == [(212, 1570), (7551, 100)]  # a reply of nothing is left out
    assert [each.tenant for each in workload.arrivals] == ["3", "19"]
    assert workload.arrivals[1].offset_s == 2.0


def test_mooncake_ticks_are_spread(tmp_path):
    """Requests of one tick come all over it, and never in the next one."""
    rows = [
        {"timestamp": tick, "input_length": 1100, "output_length": 5, "hash_ids": [0, tick, -tick]}
        for tick in range(0, 150_000, 3000)
        for _ in range(40)
    ]
    path = lines(tmp_path / "conversation_trace.jsonl", rows)
    offsets_s = np.array([each.offset_s for each in read_trace(path).arrivals])
    gaps_s = np.diff(offsets_s)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(1.0, abs=0.1)  # as of Poisson arrivals
    # The first is at 0 now, so ticks begin up to that much earlier.
    assert abs(np.bincount((offsets_s // 3.0).astype(int))[:49] - 40).max() <= 6
    assert read_trace(path) == read_trace(path)
    assert read_trace(path, seed=1) != read_trace(path)


def test_mooncake_without_ticks(tmp_path):
    """A trace with times of its own keeps them."""
    rows = [
        {"timestamp": time_ms, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}
        for time_ms in (0, 40, 277, 471)
    ]
    workload = read_trace(lines(tmp_path / "synthetic_trace.jsonl", rows))
    assert [each.offset_s for each in workload.arrivals] == [0.0, 0.04, 0.277, 0.471]


def test_mooncake_prefixes(tmp_path):
    """Equal leading ids are equal leading blocks of any size; what is no whole block is not."""
    rows = [
        {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]},
        {"timestamp": 1, "input_length": 1500, "output_length": 5, "hash_ids": [7, 8, 10]},
        {"timestamp": 2, "input_length": 1100, "output_length": 5, "hash_ids": [7, 11, 12]},
    ]
    first, second, third = read_trace(lines(tmp_path / "t.jsonl", rows)).arrivals
    for block_tokens in (16, 64, 512, 300):
        hashes = first.block_hashes(block_tokens)
        assert len(hashes) == len(set(hashes)) == 1024 // block_tokens
        assert second.block_hashes(block_tokens) == hashes
        common = 512 // block_tokens
        assert third.block_hashes(block_tokens)[:common] == hashes[:common]
        assert not set(third.block_hashes(block_tokens)[common:]) & set(hashes)


def test_sharegpt(tmp_path):
    """Every turn asks with all before it; what nobody asked for is no request."""
    conversation = [
        {"from": "gpt", "value": "x" * 40},
        {"from": "human", "value": "x" * 400},
        {"from": "gpt", "value": "y" * 80},
        {"from": "human", "value": "x" * 40},
        {"from": "gpt", "value": "z" * 120},
    ]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps([{"id": "a", "conversations": conversation}]))
    workload = read_trace(path)
    assert sizes(workload) == [(100, 20), (130, 30)]
    first, second = workload.arrivals
    assert second.offset_s > first.offset_s + 1.0  # the reply's time, and thought
    # The engine has cached question and reply of the first turn: the second begins with both.
    cached = first.block_hashes(16, with_reply=True)
    assert len(cached) == 120 // 16
    assert second.block_hashes(16)[: len(cached)] == cached


def test_agents(tmp_path):
    """Recorded times within a session; block ids, run-length coded, are the session's own."""
    turns = [
        {"t": 0.0, "in": 130, "out": 10, "h": [[1, 2]]},
        {"t": 8.0, "in": 200, "out": 20, "h": [[1, 2], [7, 1]]},
        {"t": 9.0, "in": 200, "out": 0, "h": []},
    ]
    rows = [{"id": name, "block_size": 64, "requests": turns} for name in ("a", "b")]
    workload = read_trace(lines(tmp_path / "agents.jsonl", rows))
    by_session = {
        name: [each for each in workload.arrivals if each.session == name] for name in ("a", "b")
    }
    for first, second in by_session.values():
        assert second.offset_s - first.offset_s == pytest.approx(8.0)
        assert second.block_hashes(64)[:2] == first.block_hashes(64)
        assert len(second.block_hashes(64)) == 3
    assert by_session["a"][0].block_hashes(64) != by_session["b"][0].block_hashes(64)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "no column arrival_s"),
        ("arrival_s,input_tokens\n1,2\n", "no column output_tokens"),
        ("arrival_s,input_tokens,output_tokens\n", "no requests in it"),
        ("arrival_s,input_tokens,output_tokens\n1,two,3\n", "could not convert"),
        ('{"question": 1}\n', "unknown keys question"),
        ("[1, 2]", "no JSON objects"),
        ('{"timestamp": 0,\n', "not a trace"),
    ],
)
def test_no_trace(tmp_path, content, reason):
    """What cannot be read is named, with the reason."""
    path = tmp_path / "broken.csv"
    path.write_text(content)
    with pytest.raises(TraceError, match=reason) as caught:
        read_trace(path)
    assert "broken.csv" in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(TraceError, match=r"none\.csv: cannot be read"):
        read_trace(tmp_path / "none.csv")
