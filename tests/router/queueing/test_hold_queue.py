import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.settings import RouterSettings
from router.queueing.hold_queue import HoldQueue
from router.types import RequestClass
from tests.support.builders import req


def queue(**settings) -> HoldQueue:
    return HoldQueue(RouterSettings(**settings))


def head(held: HoldQueue, skipped=()) -> str | None:
    """The id of the first request of all."""
    heads = held.heads(skipped)
    return heads[-1].id if heads else None


def order(held: HoldQueue, model: str = "m") -> list[str]:
    return [request.id for request in held.in_order(model)]


def test_short_passes_long_but_not_for_ever():
    """TTFT targets: 0.5 s and 2 ms per token."""
    held = queue(ttft_target_base_s=0.5, ttft_target_s_per_token=0.002)
    held.push(req("long", 5000, arrival_s=0.0))  # due at 10.5
    held.push(req("short", 10, arrival_s=1.0))
    held.push(req("late", 10, arrival_s=11.0))
    assert order(held) == ["short", "long", "late"]
    assert head(held) == "short"


def test_equal_deadlines_by_arrival_then_as_they_were_held():
    held = queue(ttft_target_base_s=0.0, ttft_target_s_per_token=1.0)
    held.push(req("later", 1, arrival_s=1.0))
    held.push(req("earlier", 2, arrival_s=0.0))
    held.push(req("next", 2, arrival_s=0.0))
    assert order(held) == ["earlier", "next", "later"]


def test_by_arrival_alone_and_back():
    held = queue(ttft_target_base_s=0.5, ttft_target_s_per_token=0.002)
    held.push(req("long", 5000, arrival_s=0.0))
    held.push(req("short", 10, arrival_s=1.0))
    held.reorder(by_arrival=True)
    held.push(req("shorter", 5, arrival_s=0.5))
    assert order(held) == ["long", "shorter", "short"]
    held.remove("shorter")
    held.reorder(by_arrival=False)
    assert order(held) == ["short", "long"]
    assert head(held) == "short"


@pytest.mark.parametrize(
    "bound", [{"max_held_requests": 2}, {"max_held_tokens": 20}, {"max_held_bytes": 200}]
)
def test_each_bound_holds(bound):
    held = queue(**bound)
    for request_id in "ab":
        assert held.push(req(request_id, 10, num_bytes=100))
    assert not held.push(req("c", 10, num_bytes=100))
    held.remove("a")
    assert held.push(req("c", 10, num_bytes=100))
    assert (len(held), held.num_tokens, held.num_bytes) == (2, 20, 200)


def test_queues_of_models_do_not_hide_each_other():
    held = queue()
    held.push(req("a", model="m", arrival_s=0.0))
    held.push(req("b", model="n", arrival_s=1.0))
    assert head(held) == "a"
    assert head(held, {"m"}) == "b"
    assert head(held, {"m", "n"}) is None
    assert held.num_tokens_by_model == {"m": 10, "n": 10}


def test_expires_by_its_own_deadline_or_by_ours():
    held = queue(max_hold_s=10.0)
    held.push(req("patient", arrival_s=1.0))
    held.push(req("hurried", arrival_s=1.0, deadline_s=3.0))
    assert held.next_expiry_s() == 3.0
    assert held.expire(2.9) == []
    assert [request.id for request in held.expire(3.0)] == ["hurried"]
    assert held.next_expiry_s() == 11.0
    assert [request.id for request in held.expire(99.0)] == ["patient"]
    assert held.next_expiry_s() is None


def test_leaves_nothing_behind():
    held = queue()
    held.push(req("a", num_bytes=5))
    assert held.remove("a").id == "a"
    assert held.remove("a") is None
    assert (len(held), held.num_tokens, held.num_bytes) == (0, 0, 0)
    assert held.num_tokens_by_model == {}
    assert head(held) is None
    assert order(held) == []


def test_an_id_is_held_once():
    held = queue()
    held.push(req("a"))
    with pytest.raises(ValueError, match="held already"):
        held.push(req("a"))


@given(
    st.lists(st.tuples(st.integers(0, 2000), st.floats(0, 20), st.booleans()), max_size=20),
    st.booleans(),
)
def test_tokens_before_a_request_are_those_due_before_it(requests, by_arrival):
    held = queue()
    held.reorder(by_arrival=by_arrival)
    waiting = []
    for number, (num_tokens, arrival_s, leaves) in enumerate(requests):
        request = req(str(number), num_tokens, arrival_s=arrival_s)
        held.push(request)
        waiting.append((request, leaves))
    for request, leaves in waiting:
        if leaves:
            held.remove(request.id)
    held.reorder(by_arrival=not by_arrival)
    left = [request for request, leaves in waiting if not leaves]
    for request, _ in waiting:
        due_s = held.key(request)[0]
        surely, possibly = (
            sum(each.num_prompt_tokens for each in left if held.key(each)[0] <= limit_s)
            for limit_s in (due_s, due_s + 0.125)
        )
        assert surely <= held.num_tokens_before(request) <= possibly


def test_before_a_request_go_other_tenants_shares_only():
    held = queue()
    for number in range(100):
        held.push(req(f"greedy{number}", 10, tenant="greedy"))
    assert held.num_tokens_before(req("next", 10, tenant="greedy")) == 1000
    # A newcomer's virtual time is that of the first: one of theirs may be before it.
    assert held.num_tokens_before(req("modest", 10, tenant="modest")) <= 10
    for number in range(3):
        held.push(req(f"modest{number}", 10, tenant="modest", weight=0.5))
    # Three of its own, and of the others twice as much in the same time, and one more.
    assert held.num_tokens_before(req("last", 10, tenant="modest", weight=0.5)) == 30 + 60 + 10


def test_batch_work_that_yields_is_not_before_another_tenants():
    held = queue()
    held.push(req("batch", 500, tenant="a", priority_class=RequestClass.BATCH))
    assert held.num_tokens_before(req("now", tenant="b")) == 0


@pytest.mark.parametrize("tenants", [("",), ("a", "b")])
def test_heads_of_all_queues_come_in_order_the_first_last(tenants):
    """As if the first of all were asked for again and again, and its model then skipped."""
    held = queue()
    for number in range(60):
        tenant = tenants[number % len(tenants)]
        size = 17 * number % 97 + 1
        held.push(req(f"q{number}", size, model=f"m{number % 7}", tenant=tenant, arrival_s=1.0))
    one_by_one, skipped = [], set()
    while (request_id := head(held, skipped)) is not None:
        one_by_one.append(request_id)
        skipped.add(held.get(request_id).model)
    assert len(one_by_one) == 7
    assert [request.id for request in held.heads()] == one_by_one[::-1]
