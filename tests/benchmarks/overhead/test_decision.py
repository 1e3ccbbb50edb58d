"""Every scene of the decision benchmark is what it says, and the worst row is what counts."""

import pytest

from benchmarks.overhead import decision
from benchmarks.report.report import Report
from serving.core_form import form


@pytest.mark.parametrize("scene", decision.SCENES)
def test_each_scene_times_its_events(scene):
    rows = decision.time_scene(scene, num_engines=3, num_held=50, num_decisions=20, seed=0)
    is_open = scene.startswith("open fleet")
    expected = {"arrival dispatched"} if is_open else {"arrival held", "snapshot, per dispatch"}
    if scene != "open fleet, known prefix":
        expected.add(decision.NOTHING)
    assert {row["event"] for row in rows} == expected
    for row in rows:
        assert row["held"] == (0 if is_open else 50)
        assert row["core"] == form()
        assert 0.0 < row["p50"] <= row["p99"]
        assert row["decisions"] >= 10


def test_the_worst_row_of_each_size_is_judged_and_what_changes_nothing_by_itself():
    def row(event: str, num_engines: int, p50: float) -> dict:
        return {"event": event, "engines": num_engines, "p50": p50}

    report = Report("decision", "measured", 0, {})
    rows = [
        row("arrival held", 8, 10.0),
        row("snapshot, per dispatch", 8, 20.0),
        row(decision.NOTHING, 8, 7.0),
        row("arrival held", 64, 31.0),
        row(decision.NOTHING, 64, 9.0),
    ]
    decision.set_targets(report, rows, [8, 64])
    assert [(each["value"], each["target"], each["met"]) for each in report.targets] == [
        (20.0, "<= 20", True),
        (31.0, "<= 30", False),
        (9.0, "<= 8", False),
    ]


def test_a_form_of_the_core_that_is_not_there_has_no_rows():
    options = ("--scene", "open fleet", "--engines", 1, "--held", 1, "--decisions", 1)
    assert {row["core"] for row in decision.in_form("plain", *options)} == {"plain"}
    assert decision.in_form("no such form", *options) is None


def test_of_several_runs_the_quietest_counts_for_each_event_by_itself():
    runs = [
        [{"event": "a", "p50": 3.0, "p99": 9.0}, {"event": "b", "p50": 1.0, "p99": 2.0}],
        [{"event": "a", "p50": 2.0, "p99": 99.0}, {"event": "b", "p50": 5.0, "p99": 6.0}],
    ]
    assert decision.quietest(runs) == [runs[1][0], runs[0][1]]
    assert decision.quietest([]) == []
