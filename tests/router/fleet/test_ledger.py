import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.fleet.ledger import Ledger


def book(
    ledger: Ledger,
    request_id: str,
    num_tokens: int = 10,
    now_s: float = 0.0,
    edf_key_s: float = 0.0,
) -> int:
    return ledger.book(
        request_id,
        num_prefill_tokens=num_tokens,
        num_step_tokens=num_tokens,
        num_kv_tokens=2 * num_tokens,
        num_own_kv_tokens=num_tokens,
        num_sequences=1,
        edf_key_s=edf_key_s,
        now_s=now_s,
    )


def sums(ledger: Ledger) -> tuple[int, int, int]:
    return ledger.num_prefill_tokens, ledger.num_kv_tokens, ledger.num_sequences


def test_numbers_start_at_one_and_are_never_used_again():
    ledger = Ledger()
    assert [book(ledger, "a"), book(ledger, "b")] == [1, 2]
    ledger.release("b")
    assert book(ledger, "c") == 3


def test_acknowledged_bookings_are_the_snapshots_to_count():
    """One ordered connection: a number contains all lower ones."""
    ledger = Ledger()
    for request_id in "abc":
        book(ledger, request_id)
    ledger.acknowledge(2)
    assert sums(ledger) == (10, 20, 1)
    assert ledger.num_open == 3
    ledger.acknowledge(1)  # repeated or late
    assert sums(ledger) == (10, 20, 1)


@pytest.mark.parametrize("acknowledged", [False, True])
def test_release_ends_a_booking_before_and_after_its_acknowledgement(acknowledged):
    ledger = Ledger()
    book(ledger, "a")
    if acknowledged:
        ledger.acknowledge(1)
    ledger.release("a")
    ledger.release("a")
    assert sums(ledger) == (0, 0, 0)
    assert ledger.num_open == ledger.num_unacknowledged == 0


def test_a_released_booking_may_still_be_acknowledged():
    """A failed send leaves a gap in the numbers that the engine saw."""
    ledger = Ledger()
    book(ledger, "a")
    book(ledger, "b", num_tokens=5)
    ledger.release("a")
    ledger.acknowledge(2)
    assert sums(ledger) == (0, 0, 0)
    assert ledger.num_open == 1


def test_oldest_unacknowledged():
    ledger = Ledger()
    assert ledger.oldest_unacknowledged is None
    book(ledger, "a", now_s=1.0)
    book(ledger, "b", now_s=2.0)
    ledger.acknowledge(1)
    assert ledger.oldest_unacknowledged.booked_s == 2.0


def test_one_request_is_booked_once():
    ledger = Ledger()
    book(ledger, "a")
    with pytest.raises(ValueError, match="booked already"):
        book(ledger, "a")


EVENTS = st.tuples(st.sampled_from(["book", "release", "acknowledge"]), st.integers(0, 7))


@given(st.lists(EVENTS, max_size=40))
def test_sums_are_those_of_what_is_open_and_return_to_zero(events):
    ledger, sizes, last_number, acknowledged = Ledger(), {}, 0, 0
    for event, number in events:
        if event == "book" and str(number) not in sizes:
            last_number = book(ledger, str(number), num_tokens=number + 1)
            sizes[str(number)] = (last_number, number + 1)
        elif event == "release":
            ledger.release(str(number))
            sizes.pop(str(number), None)
        elif event == "acknowledge":
            acknowledged = max(acknowledged, min(number, last_number))
            ledger.acknowledge(min(number, last_number))
        seen = [num for at, num in sizes.values() if at <= acknowledged]
        unseen = [num for at, num in sizes.values() if at > acknowledged]
        assert sums(ledger) == (sum(unseen), 2 * sum(unseen), len(unseen))
        assert ledger.num_acknowledged_own_kv_tokens == sum(seen)
        assert ledger.num_acknowledged_sequences == len(seen)
    for request_id in list(sizes):
        ledger.release(request_id)
    assert sums(ledger) == (0, 0, 0)
    assert ledger.num_acknowledged_own_kv_tokens == ledger.num_acknowledged_sequences == 0
    assert ledger.num_open == ledger.num_unacknowledged == 0


def test_what_waits_is_what_is_due_last():
    """An engine prefills in the order of keys: the last tokens are those of the highest ones."""
    ledger = Ledger()
    for request_id, num_tokens, edf_key_s in (("a", 100, 3.0), ("b", 50, 1.0), ("c", 10, 2.0)):
        book(ledger, request_id, num_tokens, edf_key_s=edf_key_s)
    assert ledger.waiting_keys_s(0) == []
    assert ledger.waiting_keys_s(100) == [3.0]
    assert ledger.waiting_keys_s(111) == [3.0, 2.0, 1.0]
    ledger.end_prefill("a")
    assert ledger.waiting_keys_s(5) == [2.0]
    ledger.release("c")
    ledger.release("b")
    assert ledger.waiting_keys_s(5) == []
