from router.core.settings import RouterSettings
from router.fleet.fleet import Fleet
from router.queueing.hold_queue import HoldQueue
from router.scheduling.wait_time import WaitEstimator
from tests.support.builders import make_replica, req


def test_names_that_clients_make_up_leave_nothing():
    """Each would be looked at with every event while anything is held."""
    fleet, queue = Fleet(), HoldQueue(RouterSettings())
    waits = WaitEstimator(fleet, queue)
    fleet.add(make_replica())
    for number, model in enumerate(["m", *(f"made-up-{each}" for each in range(100))]):
        queue.push(req(f"r{number}", model=model))
    waits.record_departures({}, now_s=1.0)
    assert waits._departure_rates.keys() == {"m"}
    for number in range(101):
        queue.remove(f"r{number}")
    waits.record_departures({}, now_s=2.0)
    assert waits._departure_rates.keys() == {"m"}
    assert not queue.num_tokens_by_model
