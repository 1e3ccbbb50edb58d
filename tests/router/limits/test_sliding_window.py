import math

import pytest

from router.limits.sliding_window import SlidingWindow


def make_window(limit: float = 10.0) -> SlidingWindow:
    """A window of about a minute (the drift of clocks makes it 60.06 s)."""
    return SlidingWindow(limit, 60.0)


def test_an_amount_ages_from_when_it_was_counted_not_from_when_it_was_sent():
    window = make_window()
    window.add_in_flight(10)
    window.advance(100.0)
    assert window.free == 0  # in flight, however long that takes
    window.count_in_flight(10, 100.0)
    window.advance(160.0)
    assert window.free == 0
    window.advance(160.1)
    assert window.free == 10
    assert window.used == 0


def test_what_was_never_sent_leaves_no_trace():
    window = make_window()
    window.add_in_flight(4)
    window.cancel_in_flight(4)
    assert window.used == 0


def test_an_amount_is_corrected_while_it_is_in_the_window():
    window = make_window()
    entry = window.add_counted(4, 0.0)
    window.adjust_entry(entry, -3, 10.0)
    assert window.used == 1
    window.advance(61.0)
    assert window.used == 0
    window.adjust_entry(entry, -1, 61.0)
    assert window.used == 0
    window.adjust_entry(entry, 2, 61.0)  # the provider has it on top of what has left
    assert window.used == 2


def test_room_comes_when_enough_has_left():
    window = make_window()
    window.add_counted(6, 0.0)
    window.add_counted(4, 30.0)
    assert window.wait_s(6, 30.0) == pytest.approx(30.06)
    assert window.wait_s(7, 30.0) == 60.06
    assert window.wait_s(11, 30.0) == math.inf
    window.advance(60.1)
    assert window.wait_s(6, 60.1) == 0.0


def test_a_report_tells_what_others_use():
    window = make_window(math.inf)
    window.add_counted(2, 0.0)
    window.record_report(limit=10, remaining=5, now_s=1.0)
    assert window.free == 5
    assert window.wait_s(6, 1.0) > 0.0
    window.advance(61.2)
    assert window.free == 10


def test_a_report_about_what_is_on_its_way_counts_nothing_twice():
    """The reply to the first request may count the second already, or not."""
    for remaining in (8, 4):
        window = make_window(math.inf)
        window.add_in_flight(2)
        window.add_in_flight(4)
        window.count_in_flight(2, 1.0)
        window.record_report(limit=10, remaining=remaining, now_s=1.0)
        assert window.free == 4


def test_a_lower_limit_of_our_own_is_for_what_we_use():
    """A key of which this gateway may use a part, while the provider reports the whole."""
    window = make_window(5.0)
    window.add_counted(1, 0.0)
    window.record_report(limit=1000, remaining=900, now_s=0.0)
    assert window.free == 4


def test_amounts_counted_together_take_no_more_memory():
    window = make_window(1e9)
    for number in range(100_000):
        window.add_counted(1, number * 0.001)
        window.advance(number * 0.001)
    assert len(window._entries) < 1000
    assert window.used == sum(entry.amount for entry in window._entries)
