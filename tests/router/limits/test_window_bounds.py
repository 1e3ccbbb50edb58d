"""A sliding window to the last amount and the last moment: what is in it, what has left."""

import math

import pytest

from router.limits.sliding_window import SlidingWindow, WindowState

STAYS_S = 60.06  # of a window of a minute: a thousandth more, for clocks that drift


def make_window(limit: float = 10.0) -> SlidingWindow:
    return SlidingWindow(limit, 60.0)


def state(used: float, limit: float | None, share: float) -> WindowState:
    return WindowState(used=used, limit=limit, share=share)


class TestState:
    def test_of_a_new_one(self):
        assert make_window().state() == state(0, 10.0, 0.0)
        assert make_window(math.inf).state() == state(0, None, 0.0)

    def test_counts_what_is_on_its_way_and_what_has_come(self):
        window = make_window()
        window.add_in_flight(3)
        window.add_in_flight(1)
        window.count_in_flight(1, 0.0)
        assert window.state() == state(4, 10.0, 0.4)
        assert window.free == 6
        window.cancel_in_flight(2)
        assert (window.used, window.used_share) == (2, pytest.approx(0.2))

    def test_may_be_fuller_than_full_but_never_emptier_than_empty(self):
        window = make_window()
        window.add_counted(15, 0.0)
        assert window.state() == state(15, 10.0, 1.5)
        window = make_window()
        window.add_in_flight(-1)  # rounding
        assert window.used_share == 0.0

    def test_without_a_limit_nothing_is_a_share_of_it(self):
        window = make_window(math.inf)
        window.add_counted(1e9, 0.0)
        assert window.used_share == 0.0
        assert window.wait_s(1e9, 0.0) == 0.0

    @pytest.mark.parametrize("remaining", [0, -1])
    def test_a_limit_of_nothing_is_used_up(self, remaining):
        window = make_window()
        window.record_report(limit=0, remaining=remaining, now_s=0.0)
        assert window.used_share == 1.0
        assert window.wait_s(1, 0.0) == math.inf

    def test_rests_of_rounding_go(self):
        window = make_window()
        window.add_in_flight(0.1)
        window.clear_in_flight()
        assert window.used == 0.0
        for amount in (0.1, 0.2, 0.3):
            window.add_counted(amount, 0.0)
        window.advance(STAYS_S)
        assert window.used == 0.0


class TestLeaves:
    def test_at_that_moment_and_not_before(self):
        window = make_window()
        window.add_counted(4, 1.0)
        window.advance(1.0 + STAYS_S - 0.001)
        assert window.used == 4
        window.advance(1.0 + STAYS_S)
        assert window.used == 0

    def test_each_by_itself(self):
        window = make_window()
        window.add_counted(4, 0.0)
        window.add_counted(2, 10.0)
        window.add_counted(1, 20.0)
        window.advance(STAYS_S + 10.0)
        assert window.used == 1

    def test_together_what_came_within_a_tenth_of_a_second(self):
        """With the last of them: earlier would be too early for some."""
        window = make_window()
        first = window.add_counted(1, 0.0)
        assert window.add_counted(1, 0.1) is first
        assert window.add_counted(1, 0.05) is first  # late news
        assert window.add_counted(1, 0.102) is not first
        window.advance(STAYS_S + 0.099)
        assert window.used == 4
        window.advance(STAYS_S + 0.1)
        assert window.used == 1

    def test_a_tenth_of_a_second_later_is_still_together(self):
        window = make_window()
        first = window.add_counted(1, 0.0)
        assert window.add_counted(1, window.window_s * (1.0 / 600.0)) is first

    def test_what_has_left_is_corrected_upwards_only(self):
        window = make_window()
        entry = window.add_counted(4, 0.0)
        window.advance(STAYS_S)
        for difference, used in ((-2, 0), (0, 0), (3, 3), (0.5, 3.5)):
            window.adjust_entry(entry, difference, STAYS_S)
            assert window.used == used
        window.advance(2 * STAYS_S - 0.01)
        assert window.used == 3.5

    def test_what_is_in_it_is_corrected_in_its_entry(self):
        window = make_window()
        entry = window.add_counted(4, 0.0)
        window.adjust_entry(entry, 2, 30.0)
        assert (window.used, entry.amount) == (6, 6)
        window.advance(STAYS_S)
        assert window.used == 0


class TestWaits:
    def test_for_as_many_as_are_needed(self):
        window = make_window()
        for number, amount in enumerate((3, 3, 4)):
            window.add_counted(amount, 10.0 * number)
        assert [round(window.wait_s(amount, 20.0), 2) for amount in (1, 3, 4, 6, 7, 10)] == [
            *(40.06, 40.06),
            *(50.06, 50.06),
            *(60.06, 60.06),
        ]
        assert window.wait_s(10.5, 20.0) == math.inf
        assert window.wait_s(3, 70.0) == 0.0  # it is due, though nobody has advanced the window

    def test_for_what_is_on_its_way_as_if_it_came_now(self):
        window = make_window()
        window.add_in_flight(10)
        assert window.wait_s(1, 100.0) == pytest.approx(STAYS_S)

    def test_not_at_all_where_it_just_fits(self):
        window = make_window()
        window.add_counted(4, 0.0)
        assert window.wait_s(6, 0.0) == 0.0
        assert window.wait_s(6.5, 0.0) > 0.0

    def test_for_what_others_have_used_in_its_turn(self):
        window = make_window()
        window.record_report(limit=10, remaining=4, now_s=20.0)  # six are others'
        window.add_counted(4, 30.0)
        window.add_counted(0, 0.0)
        assert window.wait_s(5, 40.0) == pytest.approx(20.0 + STAYS_S - 40.0)
        assert window.wait_s(8, 40.0) == pytest.approx(30.0 + STAYS_S - 40.0)


class TestReports:
    def test_lower_the_limit_and_raise_it_no_higher_than_ours(self):
        window = make_window()
        window.record_report(limit=4, remaining=4, now_s=0.0)
        assert (window.effective_limit, window.free) == (4, 4)
        window.record_report(limit=100, remaining=100, now_s=0.0)
        assert (window.effective_limit, window.free) == (10, 10)

    def test_of_more_than_we_counted_are_of_others(self):
        window = make_window()
        window.add_counted(2, 0.0)
        window.record_report(limit=10, remaining=5, now_s=1.0)
        assert (window.free, window.used) == (5, 2)

    def test_leave_between_them_what_was_known(self):
        """As much of it as there may still be."""
        window = make_window()
        window.add_counted(5, 0.0)
        window.record_report(limit=10, remaining=1, now_s=0.0)  # four of others
        window.add_in_flight(3)
        window.record_report(limit=10, remaining=4, now_s=0.0)  # six in all: one at most
        assert window.free == 10 - 5 - 3 - 1

    def test_of_less_than_we_counted_are_of_nobody(self):
        window = make_window(math.inf)
        window.add_counted(5, 0.0)
        window.record_report(limit=10, remaining=9, now_s=1.0)
        assert window.free == 5

    def test_keep_what_was_known_between_the_bounds(self):
        """With four on their way, six that are used may be two to six of others."""
        window = make_window()
        window.record_report(limit=10, remaining=7, now_s=0.0)  # three
        window.add_in_flight(4)
        for remaining, foreign in ((4, 3), (0, 6), (2, 6), (7, 3), (9, 1)):
            window.record_report(limit=10, remaining=remaining, now_s=0.0)
            assert 10 - 4 - window.free == foreign, remaining

    def test_hold_for_one_window(self):
        window = make_window()
        window.record_report(limit=10, remaining=4, now_s=5.0)
        window.advance(5.0 + STAYS_S - 0.01)
        assert window.free == 4
        window.advance(5.0 + STAYS_S)
        assert window.free == 10
