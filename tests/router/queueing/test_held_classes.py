"""What is held of each class, and which promises are broken by then."""

from router.core.settings import RouterSettings
from router.queueing.hold_queue import HoldQueue
from router.types import RequestClass
from tests.support.builders import req


def test_each_class_with_its_oldest_and_the_promise_that_is_due_next():
    """Promised are 1 s and 1 ms per token, to interactive requests half of that."""
    held = HoldQueue(RouterSettings(ttft_target_base_s=1.0, ttft_target_s_per_token=0.001))
    assert held.state(0.0).by_class == {}
    held.push(req("broken", 1000, arrival_s=0.0))  # due at 2
    held.push(req("kept", 3000, arrival_s=1.0))  # due at 5
    held.push(req("next", 2000, arrival_s=1.5))  # due at 4.5
    held.push(
        req("soon", 1000, arrival_s=2.0, priority_class=RequestClass.INTERACTIVE)  # due at 3
    )
    state = held.state(2.5)
    assert list(state.by_class) == ["interactive", "standard"]
    standard, interactive = state.by_class["standard"], state.by_class["interactive"]
    assert (standard.num_requests, standard.num_tokens, standard.num_late) == (3, 6000, 1)
    assert (standard.oldest_s, standard.due_in_s) == (2.5, 2.0)
    assert (interactive.oldest_s, interactive.due_in_s, interactive.num_late) == (0.5, 0.5, 0)
    late = held.state(3.5).by_class["interactive"]
    assert (late.num_late, late.due_in_s) == (1, None)
    for name in ("broken", "kept", "next"):
        held.remove(name)
    assert list(held.state(3.5).by_class) == ["interactive"]
