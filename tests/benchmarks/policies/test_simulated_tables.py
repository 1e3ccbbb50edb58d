"""The tables of bench-sim: where does Headway lose, and by how much at worst?"""

from benchmarks.policies.simulated_grid import cases, places
from benchmarks.policies.simulated_tables import Tables
from benchmarks.report.report import Report
from serving.capacity.sweep import Case

FIGURES = {
    "ttft_p50_s": 0.1,
    "ttft_p99_s": 1.0,
    "short_ttft_p99_s": 0.5,
    "long_ttft_p99_s": 2.0,
    "itl_p99_s": 0.02,
    "tpot_p99_s": 0.03,
    "e2e_mean_s": 5.0,
    "slowdown_p99": 3.0,
    "goodput": 0.9,
    "refused": 0.0,
}


def results(**changes):
    """Return figures of two loads and two repeats, alike but for `changes`, by variant and load."""
    return {
        Case(f"trace/8/{repeat}", 8, load, 10.0, variant, repeat, repeat): FIGURES
        | changes.get(f"{variant}_{load:.0%}", {})
        for load in (0.5, 0.9)
        for variant in ("headway", "least_requests@stock", "headway:hold", "clairvoyant")
        for repeat in range(2)
    }


def test_nothing_lost_where_all_are_alike():
    assert list(Tables(results()).losses()) == []


def test_only_policies_are_rivals():
    """An ablation is none, nor our own policy on other engines, nor the clairvoyant reference."""
    better = {"ttft_p99_s": 0.1}
    names = ("headway:hold", "headway@stock", "clairvoyant")
    assert not list(Tables(results(**{f"{name}_90%": better for name in names})).losses())


def test_who_is_looked_at_at_one_load_only_is_in_the_details_only():
    found = {
        case: figures
        for case, figures in results().items()
        if case.variant != "headway:hold" or case.load == 0.5
    }
    names = "short_ttft_p50_s long_ttft_p50_s hold_mean_s e2e_p99_s slowdown_p50"
    names += " prefix_hit_share output_tokens_per_s num_preemptions"
    missing = dict.fromkeys(names.split(), 0.0)
    report = Report("sim", "simulated", 0, {"promises": "none"})
    Tables({case: figures | missing for case, figures in found.items()}).fill(report)
    details, curves, *_ = report.tables.values()
    assert "headway:hold" in [row["policy"] for row in details]
    assert "headway:hold" not in [row["policy"] for row in curves]


def test_the_grid_of_runs():
    """Rivals at all loads, everything where the tables look; each repeat has a seed of its own."""
    small, large, squeezed = places(["trace"], [8, 64], squeezed=True)
    options = {"loads": None, "variants": None, "num_requests": 100, "num_repeats": 2, "seed": 7}
    found = list(cases(small, 50.0, **options))
    assert len(set(found)) == len(found)
    assert {case.load for case in found if case.variant == "headway"} == {0.5, 0.8, 0.9}
    assert {case.load for case in found if case.variant == "headway:hold"} == {0.8}
    assert {(case.repeat, case.seed) for case in found} == {(0, 8), (1, 9)}
    assert {case.rate for case in found} == {25.0, 40.0, 45.0}
    assert {case.num_copies for case in found} == {None}
    assert {case.load for case in cases(large, 50.0, **options)} == {0.8}
    assert {case.num_copies for case in cases(squeezed, 50.0, **options)} == {1}
    chosen = options | {"loads": [0.7], "variants": ["round_robin@stock"]}
    assert len(list(cases(large, 50.0, **chosen))) == 2


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
    assert (p99["best_other"], p99["factor"], p99["clairvoyant"]) == (
        "least_requests@stock",
        3.0,
        1.0,
    )
    assert p99["headway"] == "3 [3 to 3]"
    assert (goodput["figure"], goodput["at_loads"], goodput["factor"]) == ("goodput", "90%", 2.0)


def test_ours_over_the_best_rival_on_stock_engines():
    """The best is another one for each figure; rivals on our engines do not count."""
    more = dict.fromkeys(["short_ttft_p50_s", "e2e_p99_s", "slowdown_p50", "prefix_hit_share"], 0.0)
    changed = {
        "headway_50%": {"short_ttft_p99_s": 0.3, "goodput": 0.9},
        "headway_90%": {"ttft_p99_s": 1.5, "short_ttft_p99_s": 0.3, "itl_p99_s": 0.01},
        "clairvoyant_90%": {"ttft_p99_s": 0.1},
    }
    found = results(**changed)
    rows = list(Tables({case: more | figures for case, figures in found.items()}).ratios())
    assert [(row["load"], row["missed"]) for row in rows] == [("50%", 0), ("90%", 1)]
    assert rows[1]["ttft_p99"] == 1.5
    assert rows[1]["itl_p99"] == 0.5
    assert "prefix_hit_share" not in rows[0]  # nobody has any


def test_the_report_has_details_curves_and_losses():
    report = Report("sim", "simulated", 0, {"promises": "none"})
    names = "short_ttft_p50_s long_ttft_p50_s hold_mean_s e2e_p99_s slowdown_p50"
    names += " prefix_hit_share output_tokens_per_s num_preemptions"
    missing = dict.fromkeys(names.split(), 0.0)
    changed = results(**{"headway_90%": {"ttft_p99_s": 3.0}})
    Tables({case: figures | missing for case, figures in changed.items()}).fill(report)
    details, curves, ratios, compared, losses = report.tables.values()
    assert {row["over"] for row in compared} == {row["policy"] for row in details} - {"headway"}
    assert [row["policy"] for row in details] == [row["policy"] for row in curves]
    assert curves[0]["knee"] == 0.5
    assert curves[1]["knee"] is None
    assert len(losses) == 1
    assert [row["ttft_p99"] for row in ratios] == [1.0, 3.0]


def test_ratios_are_of_the_same_requests():
    """Repeat by repeat, so that what all runs of a repeat have in common is none of a policy's."""
    found = results()
    for case in found:
        slow = 3.0 if case.repeat else 1.0  # a repeat with more bursts
        better = 0.5 if case.variant == "headway" else 1.0
        found[case] = FIGURES | {"ttft_p99_s": better * slow}
    rows = [row for row in Tables(found).comparisons() if row["over"] == "least_requests@stock"]
    assert [row["runs"] for row in rows] == [2, 2]
    assert {row["ttft_p99"] for row in rows} == {"0.50 [0.50 to 0.50]"}
    one_missing = {case: each for case, each in found.items() if case.repeat or "@" in case.variant}
    (row, _) = (r for r in Tables(one_missing).comparisons() if "@" in str(r["over"]))
    assert (row["runs"], row["ttft_p99"]) == (1, "0.50")
