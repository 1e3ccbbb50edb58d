"""Figures and targets of a comparison, from samples made by hand."""

import csv
from pathlib import Path

import pytest

from benchmarks.load.mix import MixRequest
from benchmarks.report.latency import Latencies, Sample, write_csv
from benchmarks.report.plot_ttft import plot_ttft
from benchmarks.report.report import Report
from serving.capacity.client import Record


def sample(policy: str, ttft_s: float | None, kind: str = "short", repeat: int = 0) -> Sample:
    """Due at 0 s, done one second after its first token, with 11 tokens."""
    done = ttft_s is not None
    e2e_s = ttft_s + 1.0 if ttft_s is not None else None
    tokens = 11 if done else 0
    error = "" if done else "refused"
    return Sample(repeat, policy, 0, kind, 10, 0.0, ttft_s, e2e_s, tokens, done, error)


def make_latencies() -> Latencies:
    """Ours: short 1 to 100 ms. Rival: 3 times that. Slow: 10 times. Long: 1, 2, 4 s."""
    samples = []
    for policy, factor in (("headway", 1), ("rival", 3), ("slow", 10)):
        samples += [sample(policy, factor * n / 1000, repeat=n % 2) for n in range(1, 101)]
    samples += [
        sample(policy, ttft_s, "long", repeat=repeat)
        for policy, ttft_s in (("headway", 1.0), ("rival", 2.0), ("slow", 4.0))
        for repeat in (0, 1)
    ]
    return Latencies(samples)


def make_report() -> Report:
    return Report("real", "measured", seed=0, config={})


def test_percentiles_by_policy_class_and_repeat() -> None:
    found = make_latencies()
    assert found.policies == ["headway", "rival", "slow"]
    assert found.ttft_s("headway", "short", 50) == 0.050
    assert found.ttft_s("headway", "short", 99) == 0.099
    assert found.ttft_s("headway", "long", 99) == 1.0
    assert found.ttft_s("headway", "all", 100) == 1.0
    by_repeat = found.ttft_by_repeat_s("headway", "short", 100)
    assert by_repeat is not None
    assert sorted(by_repeat.values) == [0.099, 0.100]


def test_tokens_per_second_leave_out_the_time_between_repeats() -> None:
    found = Latencies([sample("a", 1.0), sample("a", 3.0), sample("a", 1.0, repeat=1)])
    assert found.tokens_per_s("a") == pytest.approx(33 / (4.0 + 2.0))


def test_best_rival_is_that_with_the_lowest_short_p99() -> None:
    found = make_latencies()
    assert found.best(["slow", "rival"]) == "rival"
    assert found.best([]) is None


def test_targets_are_held_against_the_best_rival() -> None:
    report = make_report()
    make_latencies().set_targets(report, "headway", ["slow", "rival"])
    targets = {target["name"]: target for target in report.targets}
    assert list(targets) == [
        "short TTFT p99 of headway over that of rival",
        "overall TTFT p50 of headway over that of rival",
        "tokens/s of headway over that of rival",
        "long TTFT p99 of headway over that of rival",
    ]
    values = [target["value"] for target in targets.values()]
    assert values == pytest.approx([1 / 3, 1 / 3, 3.0 / 2.0, 0.5])
    assert all(target["met"] for target in targets.values())
    (rows,) = report.tables.values()
    assert [row["policy"] for row in rows] == ["slow", "rival"]


def test_worse_than_the_rival_is_missed() -> None:
    report = make_report()
    make_latencies().set_targets(report, "slow", ["headway"])
    assert not any(target["met"] for target in report.targets)


def test_no_rival_no_target() -> None:
    report = make_report()
    make_latencies().set_targets(report, "headway", [])
    assert not report.targets


def test_failed_requests_are_counted_and_in_no_percentile() -> None:
    found = Latencies([sample("a", 1.0), sample("a", None), sample("b", None)])
    assert found.completed("a") == 0.5
    assert found.ttft_s("a", "short", 99) == 1.0
    assert found.ttft_s("b", "short", 99) is None
    assert found.tokens_per_s("b") == 0.0
    report = make_report()
    found.fill(report)
    rest = {row["policy"]: row for row in report.tables["Throughput and ends"]}
    assert (rest["a"]["errors"], rest["b"]["completed"]) == (1, 0.0)


def test_times_count_from_when_a_request_was_due() -> None:
    request = MixRequest(7, offset_s=2.0, kind="short", num_text_tokens=10, num_output_tokens=5)
    record = Record(due_s=100.0, sent_s=100.5, first_s=101.0, last_s=103.0, completed=True)
    made = Sample.of(1, "headway", request, record)
    assert (made.due_s, made.ttft_s, made.e2e_s, made.num_output_tokens) == (2.0, 1.0, 3.0, 5)
    assert made.tpot_s == 0.5
    record.completed, record.error = False, "vanished"
    made = Sample.of(1, "headway", request, record)
    assert (made.ttft_s, made.e2e_s, made.num_output_tokens) == (None, None, 0)
    assert made.tpot_s is None


def test_lines_and_figure(tmp_path: Path) -> None:
    path = tmp_path / "real.csv"
    write_csv([*make_latencies().samples, sample("headway", None)], path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 307
    assert rows[0]["policy"] == "headway"
    assert float(rows[0]["ttft_s"]) == 0.001
    assert rows[-1]["ttft_s"] == ""
    first = plot_ttft(path).read_bytes()
    assert b"rival" in first
    assert plot_ttft(path).read_bytes() == first
