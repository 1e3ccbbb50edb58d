"""What a token and a request cost over the floor: measured in less than a minute, and judged."""

import gc
from collections.abc import Callable

import pytest

from benchmarks.overhead import short
from benchmarks.overhead.figures import Figures
from benchmarks.systems.processes import raise_file_limit

ROW = {
    "commit": "b",
    "core": "plain",
    "CPU per token at 2,000": 3.0,
    "CPU per short request": 4.0,
}


def test_only_a_gross_growth_of_cpu_time_is_a_regression() -> None:
    before = {**ROW, "commit": "a", "CPU per short request": 2.1}
    lines, grown = short.compare(ROW, before)
    assert grown == []
    assert "CPU per short request, over the floor's: 4 (2.1 at a; core plain)" in lines
    _, grown = short.compare(ROW, {**before, "CPU per short request": 1.9})
    assert grown == ["CPU per short request"]


def test_what_was_never_measured_is_no_regression() -> None:
    lines, grown = short.compare(ROW, None)
    assert grown == []
    assert all("none before" in line for line in lines)
    assert len(lines) == 2


def test_rows_are_compared_with_the_last_of_their_form() -> None:
    plain, compiled = {**ROW, "commit": "a"}, {**ROW, "commit": "a", "core": "compiled"}
    assert short.last_comparable([plain, compiled], ROW) is plain
    assert short.last_comparable([compiled], ROW) is None


def test_a_commit_that_is_measured_again_has_one_row(tmp_path) -> None:
    figures = Figures()
    figures.add("own", "Cores taken by strangers meanwhile", "cores", 0.0)
    older, again = {**ROW, "commit": "a"}, {**ROW, "CPU per short request": 5.0}
    short.make_report(figures, again, [older, ROW]).write(tmp_path)
    assert short.read_history(tmp_path) == [older, again]


@pytest.mark.timeout(300)
async def test_the_path_has_not_become_grossly_more_expensive(
    record_property: Callable[[str, object], None],
) -> None:
    """Compared with the last run that was committed. What looks grossly worse is measured again."""
    raise_file_limit()
    before = short.read_history()
    gc.disable()
    try:
        for _ in range(2):
            _, row = await short.measure()
            lines, grown = short.compare(row, short.last_comparable(before, row))
            record_property("figures", "\n".join(lines))
            if not grown:
                break
    finally:
        gc.enable()
    assert not grown, lines
    assert len(lines) == 3
