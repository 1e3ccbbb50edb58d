import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.resilience.retry_budget import RetryBudget, RetryBudgetState
from router.resilience.settings import RetryBudgetSettings


def make_budget(**settings: float) -> RetryBudget:
    defaults = {"share": 0.5, "reserve_per_s": 0.0, "max_balance": 2.0}
    return RetryBudget(RetryBudgetSettings(**defaults | settings), now_s=0.0)


def test_a_quiet_gateway_can_retry_its_first_failure():
    assert make_budget().try_withdraw(0.0)


def test_requests_fill_it_by_their_share():
    budget = make_budget()
    assert [budget.try_withdraw(0.0) for _ in range(3)] == [True, True, False]
    budget.deposit()
    assert not budget.try_withdraw(0.0)
    budget.deposit()
    assert budget.try_withdraw(0.0)
    assert budget.state() == RetryBudgetState(balance=0.0, num_withdrawn=3, num_refused=2)


def test_time_fills_it_too():
    budget = make_budget(reserve_per_s=0.1)
    while budget.try_withdraw(0.0):
        pass
    assert not budget.try_withdraw(9.0)
    assert budget.try_withdraw(10.1)
    assert not budget.try_withdraw(19.0)  # 8.9 s have passed since, not 29.1
    assert budget.try_withdraw(20.2)


def test_nothing_saved_up_nothing_retried():
    budget = make_budget(max_balance=0.0)
    budget.deposit()
    assert not budget.try_withdraw(1e9)


@given(
    share=st.sampled_from([0.0, 0.2, 1.0]),
    reserve_per_s=st.sampled_from([0.0, 1.0]),
    max_balance=st.sampled_from([0.0, 1.0, 10.0]),
    events=st.lists(
        st.sampled_from(["arrive", "retry", "retry", "wait", "set back"]), max_size=200
    ),
)
def test_the_bound_holds_between_any_two_moments(share, reserve_per_s, max_balance, events):
    budget = make_budget(share=share, reserve_per_s=reserve_per_s, max_balance=max_balance)
    now_s = elapsed_s = 0.0
    moments = [(0.0, 0, 0)]  # seconds, requests, retries
    num_requests = num_retries = 0
    for event in events:
        if event == "arrive":
            budget.deposit()
            num_requests += 1
        elif event == "retry":
            num_retries += budget.try_withdraw(now_s)
        else:
            now_s += 0.7 if event == "wait" else -0.2
            elapsed_s = max(elapsed_s, now_s)
        for start_s, requests, retries in moments:
            bound = (
                max_balance
                + share * (num_requests - requests)
                + reserve_per_s * (elapsed_s - start_s)
            )
            assert num_retries - retries <= bound + 1e-6
        moments.append((elapsed_s, num_requests, num_retries))
    assert budget.num_withdrawn == num_retries
    assert budget.state().balance == pytest.approx(max(0.0, budget.state().balance))
