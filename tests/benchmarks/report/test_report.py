"""What does a benchmark leave behind?"""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.report.report import Report, Spread, percentile
from serving.core_form import form


def make_report() -> Report:
    report = Report("speed", "measured", seed=7, config={"num_engines": 2})
    report.add_row("Rates", path="own", tokens_per_s=Spread.of([3.0, 1.0, 2.0]), failed=0)
    report.add_row("Rates", path="other", tokens_per_s=None)
    report.add_target("tokens/s", Spread.of([3.0, 1.0, 2.0]), ">= 2")
    report.add_target("added ms", 6.5, "<= 5")
    report.add_target("never taken", None, "== 0")
    return report


def test_file_tells_everything(tmp_path: Path) -> None:
    path = make_report().write(tmp_path)
    assert [path] == list(tmp_path.iterdir())
    content = json.loads(path.read_text())
    assert path.name == "speed.json"
    assert (content["name"], content["kind"], content["seed"]) == ("speed", "measured", 7)
    assert content["config"] == {"num_engines": 2}
    assert content["hardware"]["num_cores"] >= 1
    assert content["hardware"]["ram_bytes"] > 0
    assert {"cpu", "gpus"} <= content["hardware"].keys()
    assert "python" in content["versions"]
    assert content["core"] == form()
    assert content["date"].endswith("+00:00")
    assert content["commit"].keys() == {"id", "dirty"}
    assert content["figures"]["Rates"][0]["tokens_per_s"] == {
        "median": 2.0,
        "min": 1.0,
        "max": 3.0,
        "values": [3.0, 1.0, 2.0],
    }
    assert content["targets"] == [
        {"name": "tokens/s", "value": 2.0, "target": ">= 2", "met": True},
        {"name": "added ms", "value": 6.5, "target": "<= 5", "met": False},
        {"name": "never taken", "value": None, "target": "== 0", "met": False},
    ]


def test_missed_targets_are_said_in_words() -> None:
    output = io.StringIO()
    make_report().show(Console(file=output, width=100))
    text = output.getvalue()
    assert "met  tokens/s: 2.00, target >= 2" in text
    assert "MISSED  added ms: 6.50, target <= 5" in text
    assert "MISSED  never taken: not measured" in text
    assert "2 of 3 targets missed" in text
    assert "2.00 (1.00 to 3.00)" in text


def test_failed_write_leaves_the_last_result(tmp_path: Path) -> None:
    path = make_report().write(tmp_path)
    before = path.read_text()
    report = make_report()
    report.config["bad"] = object()
    with pytest.raises(TypeError):
        report.write(tmp_path)
    assert path.read_text() == before
    assert [path] == list(tmp_path.iterdir())


def test_target_must_compare() -> None:
    with pytest.raises(ValueError, match="no comparison"):
        make_report().add_target("tokens/s", 1.0, "about 5")


def test_percentile_is_nearest_rank() -> None:
    values = [float(number) for number in range(100, 0, -1)]
    assert [percentile(values, p) for p in (0, 1, 50, 99, 100)] == [1, 1, 50, 99, 100]
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)
