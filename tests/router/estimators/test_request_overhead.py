import pytest

from router.estimators.request_overhead import RequestOverhead
from router.fleet.fleet import Fleet
from tests.support.builders import make_replica, make_router, req


def test_the_median_once_enough_are_known() -> None:
    overhead = RequestOverhead()
    for _ in range(7):
        overhead.learn(0.05)
    assert overhead.usual_s == 0.0
    overhead.learn(3.0)  # one that had something compiled
    assert overhead.usual_s == 0.05
    for _ in range(32):
        overhead.learn(0.2)  # the load has changed
    assert overhead.usual_s == 0.2


def test_never_negative() -> None:
    overhead = RequestOverhead()
    for _ in range(20):
        overhead.learn(-1.0)
    assert overhead.usual_s == 0.0


def test_all_of_a_kind_together() -> None:
    fleet = Fleet()
    replicas = [make_replica("r0"), make_replica("r1"), make_replica("r2", device="another")]
    for replica in replicas:
        fleet.add(replica)
    for _ in range(8):
        replicas[0].request_overhead.learn(0.05)
    assert [replica.request_overhead.usual_s for replica in replicas] == [0.05, 0.05, 0.0]


def test_what_comes_on_top_of_steps_is_predicted_from_then_on() -> None:
    router = make_router()
    predicted_s = []
    for number in range(20):
        now_s = float(number)
        router.on_arrival(req(str(number), 100), now_s)
        placement = router._attempts.oldest(str(number))
        assert placement is not None
        predicted_s.append(placement.predicted_ttft_s)
        steps_s = predicted_s[0]  # no step is reported, so nothing is learned of these
        router.on_first_token(str(number), now_s + steps_s + 0.04)
        router.on_finish(str(number), None, now_s + 0.5)
    assert predicted_s[7] == predicted_s[0]
    assert predicted_s[8:] == pytest.approx([predicted_s[0] + 0.04] * 12)
    replica = router.state(20.0).replicas["r0"]
    assert replica.path_s == pytest.approx(0.04)
