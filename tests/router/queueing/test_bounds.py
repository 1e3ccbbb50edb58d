"""Who has to make room in a full hold queue."""

from router.core.router import Router
from router.core.settings import RouterSettings
from router.queueing.hold_queue import HoldQueue
from router.types import Hold, Outcome, Reject, RejectReason
from tests.support.builders import make_router, req, snapshot


def full(num_greedy: int = 9, num_modest: int = 1, **fields) -> HoldQueue:
    """A queue of ten places, taken by two tenants."""
    held = HoldQueue(RouterSettings(max_held_requests=10, max_held_tokens=1000))
    for number in range(num_greedy):
        held.push(req(f"g{number}", tenant="greedy", arrival_s=number, **fields))
    for number in range(num_modest):
        held.push(req(f"m{number}", tenant="modest", arrival_s=number))
    return held


def leaving(held: HoldQueue, request) -> list[str]:
    return [each.id for each in held.make_room(request)]


def test_the_newest_of_who_has_most_leaves():
    held = full()
    newcomer = req("m1", tenant="modest")
    assert not held.push(newcomer)
    assert leaving(held, newcomer) == ["g8"]
    assert held.push(newcomer)
    assert "g8" not in held


def test_who_has_most_gets_no_more():
    held = full()
    assert leaving(held, req("g9", tenant="greedy")) == []
    assert len(held) == 10


def test_equals_do_not_evict_each_other():
    held = full(5, 5)
    assert leaving(held, req("m5", tenant="modest")) == []
    assert leaving(held, req("new", tenant="new")) != []


def test_shares_go_by_weight():
    held = full(6, 4, weight=3.0)  # a third of 6 is less than 4
    assert leaving(held, req("m4", tenant="modest")) == []
    assert leaving(held, req("g6", tenant="greedy", weight=3.0)) == ["m3"]


def test_only_what_lacks_counts():
    """Tokens lack: whoever has those leaves, however few requests they are."""
    held = HoldQueue(RouterSettings(max_held_requests=100, max_held_tokens=1000))
    held.push(req("document", 950, tenant="one"))
    for number in range(5):
        held.push(req(f"short{number}", 10, tenant="many"))
    assert leaving(held, req("question", 20, tenant="three")) == ["document"]


def test_it_is_all_or_nothing():
    """Who would still not fit evicts nobody."""
    held = full()
    assert leaving(held, req("huge", 2000, tenant="modest")) == []
    assert len(held) == 10


def test_what_was_placed_before_stays():
    held = full(tried=("r0",))
    assert leaving(held, req("m1", tenant="modest")) == []


def crowded(**settings) -> Router:
    """One engine that is busy for 100 s, and three places to wait in, a greedy tenant's all."""
    router = make_router(max_held_requests=3, **settings)
    busy = snapshot(1, num_running_reqs=1, num_pending_prefill_tokens=10_000)
    router.on_snapshot("r0", busy, 0.0)
    for number in range(3):
        request = req(f"g{number}", tenant="greedy", arrival_s=0.01 * number)
        assert router.on_arrival(request, 0.01 * number) == [Hold(request.id)]
    return router


def test_a_modest_tenant_finds_room_and_the_other_is_told():
    router = crowded()
    reject, hold = router.on_arrival(req("modest", tenant="modest", arrival_s=1.0), 1.0)
    assert reject == Reject("g2", RejectReason.QUEUE_FULL, reject.retry_after_s)
    assert reject.retry_after_s > 0.0
    assert hold == Hold("modest")
    [reject] = router.on_arrival(req("g3", tenant="greedy", arrival_s=2.0), 2.0)
    assert reject.request_id == "g3"
    assert router.outcomes == {Outcome.REJECTED: 2}


def backlog(num_tokens: int, **settings) -> Router:
    """An engine, and one tenant's backlog of so many tokens in prompts of 1,000."""
    router = make_router(max_late_s=None, **settings)  # all are held that can be
    router.on_snapshot("r0", snapshot(1, num_running_reqs=1, num_pending_prefill_tokens=500), 0.0)
    for number in range(num_tokens // 1000):
        router.on_arrival(req(f"g{number}", 1000, tenant="greedy"), 0.0)
    return router


def test_anothers_backlog_makes_nobody_hopeless():
    """By arrival it would come long after its deadline; by virtual time it comes soon."""
    router = backlog(100_000)
    prefill_s = 100_000 / router.state(0.0).replicas["r0"].prefill_tokens_per_s
    late = req("g", 1000, tenant="greedy", arrival_s=1.0, deadline_s=prefill_s / 2)
    [reject] = router.on_arrival(late, 1.0)
    assert reject.reason is RejectReason.HOPELESS
    fields = {"tenant": "modest", "arrival_s": 1.0, "deadline_s": prefill_s / 10}
    assert router.on_arrival(req("m", 100, **fields), 1.0) == [Hold("m")]


def test_who_is_late_by_its_own_backlog_is_still_told_so():
    router = backlog(50_000)
    prefill_s = 50_000 / router.state(0.0).replicas["r0"].prefill_tokens_per_s
    for number in range(50):
        router.on_arrival(req(f"m{number}", 1000, tenant="modest"), 0.0)
    fields = {"tenant": "modest", "arrival_s": 1.0}
    [reject] = router.on_arrival(req("m", 1000, **fields, deadline_s=prefill_s), 1.0)
    assert reject.reason is RejectReason.HOPELESS  # both wait for as much: 100,000 in all
    patient = req("p", 1000, **fields, deadline_s=3 * prefill_s)
    assert router.on_arrival(patient, 1.0) == [Hold("p")]


def test_tokens_before_agree_with_the_order_in_which_they_leave():
    """Against the queue's own order, whatever the weights."""
    held = HoldQueue(RouterSettings())
    weights = {"a": 3.0, "b": 1.0, "c": 2.0}
    for number in range(300):
        tenant = "abc"[number % 3]
        size = 10 if tenant == "b" else 100
        held.push(req(f"q{number}", size, tenant=tenant, weight=weights[tenant], arrival_s=number))
    for tenant, weight in weights.items():
        newcomer = req("new", 50, tenant=tenant, weight=weight, arrival_s=1000.0)
        predicted = held.num_tokens_before(newcomer)
        held.push(newcomer)
        before = 0
        for request in held.in_order("m"):
            if request is newcomer:
                break
            before += request.num_prompt_tokens
        held.remove("new")
        assert abs(predicted - before) <= 2 * 100 + 10, tenant
