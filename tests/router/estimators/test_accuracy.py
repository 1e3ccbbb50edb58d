import pytest

from router.estimators.accuracy import Accuracy, AccuracyState


def test_nothing_compared_yet():
    assert Accuracy().state() == AccuracyState(
        num_compared=0, error_p50=None, error_p90=None, predicted_over_actual_p50=None
    )


def test_errors_are_relative_to_what_came():
    accuracy = Accuracy()
    for predicted_s in (0.5, 1.0, 1.25):
        accuracy.add(predicted_s, actual_s=1.0)
    accuracy.add(1.0, actual_s=0.0)  # nothing to compare with
    assert accuracy.state() == AccuracyState(
        num_compared=3, error_p50=0.25, error_p90=0.5, predicted_over_actual_p50=1.0
    )


def test_an_error_is_never_a_share_of_nearly_nothing():
    """A reply that comes in one piece: 30 ms were predicted for what took 50 µs."""
    accuracy = Accuracy()
    accuracy.add(0.03, actual_s=50e-6)
    assert accuracy.state().error_p50 == pytest.approx(0.6, rel=0.01)
    assert accuracy.state().predicted_over_actual_p50 == pytest.approx(1.6, rel=0.01)
    accuracy = Accuracy()
    accuracy.add(0.05, actual_s=0.025)
    accuracy.add(0.2, actual_s=0.05)
    assert accuracy.state().error_p90 == pytest.approx(3.0)
    assert accuracy.state().predicted_over_actual_p50 == pytest.approx(4.0)


def test_old_errors_leave():
    accuracy = Accuracy()
    for _ in range(1000):
        accuracy.add(9.0, actual_s=1.0)
    for _ in range(1000):
        accuracy.add(1.0, actual_s=1.0)
    assert accuracy.state().error_p90 == 0.0


def test_the_median_is_reviewed_every_fifty():
    accuracy = Accuracy()
    for _ in range(49):
        accuracy.add(3.0, actual_s=1.0)
    assert accuracy.error_p50 is None
    accuracy.add(3.0, actual_s=1.0)
    assert accuracy.error_p50 == 2.0
    for _ in range(50):
        accuracy.add(1.0, actual_s=1.0)
    assert accuracy.error_p50 == 2.0  # half were bad
    for _ in range(49):
        accuracy.add(1.0, actual_s=1.0)
        assert accuracy.error_p50 == 2.0
    accuracy.add(1.0, actual_s=1.0)
    assert accuracy.error_p50 == 0.0


def test_a_review_that_is_due_waits_for_whoever_asks():
    accuracy = Accuracy()
    for _ in range(50):
        accuracy.add(3.0, actual_s=1.0)
    for _ in range(60):
        accuracy.add(1.0, actual_s=1.0)
    assert accuracy.error_p50 == 0.0
