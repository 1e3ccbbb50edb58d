"""Short ways to bring a router into a state, and to see what became of it."""

from router.core.router import Router
from router.types import Decision, Dispatch, Fail, Outcome
from tests.support.builders import fail_attempt, req

FULL = 5000  # tokens: an engine with a prompt of this size to prefill takes no more


def ends(router: Router) -> dict[Outcome, int]:
    return {outcome: count for outcome, count in router.outcomes.items() if count}


def given_up(router: Router, request_id: str) -> list[Decision]:
    """What follows when a request fails that cannot be retried."""
    fail, *decisions = fail_attempt(router, request_id, None, 1.0, can_retry=False) or [None]
    assert fail in (Fail(request_id), None)
    return decisions


def occupy(router: Router, *replica_ids: str) -> None:
    """Fill the windows of these replicas, each by one request that names it."""
    for replica_id in replica_ids:
        [dispatch] = router.on_arrival(req(f"full-{replica_id}", FULL), now_s=0.0)
        assert isinstance(dispatch, Dispatch)
