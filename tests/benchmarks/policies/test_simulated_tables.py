"""The tables of bench-sim: where does Headway lose, and by how much at worst?"""

from benchmarks.policies.simulated_tables import Tables
from benchmarks.report.report import Report
from serving.capacity.sweep import Case

FIGURES = {
    "ttft_p50_s": 0.1,
    "ttft_p99_s": 1.0,
    "short_ttft_p99_s": 0.5,
    "long_ttft_p99_s": 2.0,
    "tpot_p99_s": 0.03,
    "goodput": 0.9,
    "output_tokens_per_s": 1000.0,
}


def results(**changes):
    """Return figures of two loads and two repeats, alike but for `changes`, by variant and load."""
    return {
        Case(f"trace/8/{repeat}", 8, load, 10.0, variant, repeat, repeat): FIGURES
        | changes.get(f"{variant}_{load:.0%}", {})
        for load in (0.5, 0.9)
        for variant in ("headway", "least_requests", "headway:hold", "clairvoyant")
        for repeat in range(2)
    }


def test_nothing_lost_where_all_are_alike():
    assert list(Tables(results()).losses()) == []


def test_only_policies_are_rivals():
    """An ablation is none, nor is the clairvoyant reference."""
    better = {"ttft_p99_s": 0.1}
    assert not list(
        Tables(results(**{"headway:hold_90%": better, "clairvoyant_90%": better})).losses()
    )


def test_losses_at_their_worst():
    lost = Tables(
        results(
            **{
                "headway_50%": {"ttft_p99_s": 1.2},
                "headway_90%": {"ttft_p99_s": 3.0, "goodput": 0.45},
            }
        )
    )
    p99, goodput = lost.losses()
    assert (p99["figure"], p99["at_loads"], p99["worst_at"]) == ("ttft_p99_s", "50%, 90%", "90%")
    assert (p99["best_other"], p99["factor"], p99["clairvoyant"]) == ("least_requests", 3.0, 1.0)
    assert p99["headway"] == "3 [3 to 3]"
    assert (goodput["figure"], goodput["at_loads"], goodput["factor"]) == ("goodput", "90%", 2.0)


def test_the_report_has_details_curves_and_losses():
    report = Report("sim", "simulated", 0, {"slo": "none"})
    names = "short_ttft_p50_s ttft_p90_s hold_mean_s tpot_p50_s e2e_p99_s fairness"
    names += " prefix_hit_share num_shed num_preemptions"
    missing = dict.fromkeys(names.split(), 0.0)
    changed = results(**{"headway_90%": {"ttft_p99_s": 3.0}})
    Tables({case: figures | missing for case, figures in changed.items()}).fill(report)
    details, curves, losses = report.tables.values()
    assert [row["policy"] for row in details] == [row["policy"] for row in curves]
    assert curves[0]["knee"] == 0.5
    assert curves[1]["knee"] is None
    assert len(losses) == 1
