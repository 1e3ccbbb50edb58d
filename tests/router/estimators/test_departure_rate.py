import pytest

from router.estimators.departure_rate import DepartureRate


def test_nothing_is_known_of_a_queue_that_was_empty():
    rate = DepartureRate(0.0)
    rate.record_departures(500, False, 10.0)
    assert rate.wait_s(100) == 0.0


def test_the_rate_is_what_leaves_a_backlog():
    rate = DepartureRate(0.0)
    rate.record_departures(0, True, 0.0)
    for step in range(1, 200):
        rate.record_departures(100, True, step * 0.1)
    assert rate.wait_s(1000) == pytest.approx(1.0, rel=0.05)


def test_a_backlog_that_stands_still_waits_ever_longer():
    rate = DepartureRate(0.0)
    rate.record_departures(0, True, 0.0)
    waits_s = []
    for second in range(1, 30):
        rate.record_departures(100 if second < 10 else 0, True, float(second))
        waits_s.append(rate.wait_s(1000))
    assert waits_s[-1] > 10 * waits_s[8]
