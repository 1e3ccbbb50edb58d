import pytest

from router.fleet.step_budget import (
    StepBudget,
    cut_after,
    gives_way,
    long_part_tokens,
    step_prefill_tokens,
)


@pytest.mark.parametrize(
    ("overhead_s", "token_s", "num_tokens"),
    [
        (0.010, 20e-6, 3250),  # 65 ms are left of 75
        (0.030, 20e-6, 7500),  # 45 ms are left, and 150 are five times the rest of the step
        (0.090, 3e-3, 150),  # nothing is left: 450 ms
        (0.010, 1e-6, 8000),  # all of the step takes less
        (0.001, 10e-3, 16),
        (0.0, 0.0, 8000),
    ],
)
def test_what_the_target_leaves(overhead_s: float, token_s: float, num_tokens: int) -> None:
    assert step_prefill_tokens(overhead_s, token_s, 0.075, 8000) == pytest.approx(num_tokens, abs=1)


def test_no_target_is_no_limit() -> None:
    assert step_prefill_tokens(0.01, 1e-3, 0.0, 8000) == 8000
    assert step_prefill_tokens(0.01, 1e-3, 0.0, -3) == 1


def test_a_part_is_something() -> None:
    assert long_part_tokens(3250) == 812
    assert long_part_tokens(1) == 1


def test_who_gives_way_to_whom() -> None:
    assert not gives_way(600, 400, 2, 1, 1000)  # both fit
    assert gives_way(601, 400, 2, 1, 1000)
    assert not gives_way(601, 400, 1, 2, 1000)  # it is due sooner itself
    assert not gives_way(601, 400, 1, 1, 1000)


def test_it_learns_what_steps_take() -> None:
    """From 400 tokens at first, as guessed, to what 20 µs per token and 10 ms leave room for."""
    budget = StepBudget(0.075, 8192)
    assert budget.prefill_tokens(0) == 400
    for _ in range(30):
        num_tokens = budget.prefill_tokens(20)
        budget.learn(0.008 + 20 * 1e-4 + num_tokens * 20e-6, num_tokens, 20)
        budget.learn(0.5, 0, 20)  # says nothing of steps with prefill
    assert budget.prefill_tokens(20) == pytest.approx(3250, rel=0.02)


def test_a_step_that_compiled_for_seconds_is_outweighed() -> None:
    budget = StepBudget(0.075, 8192)
    for step_s in (3.0, 5.0, 0.01):
        budget.learn(step_s, 2, 0)
    for _ in range(30):
        num_tokens = budget.prefill_tokens(20)
        budget.learn(0.01 + num_tokens * 20e-6, num_tokens, 20)
    assert budget.prefill_tokens(20) == pytest.approx(3250, rel=0.1)


@pytest.mark.parametrize(
    ("num_left", "cut"),
    [
        ([400, 4000], 1),  # 2,600 more take 52 ms, a step of its own costs the long one 10
        ([4000, 400], 0),  # the long one comes first: nothing ends before it
        ([400, 500], 0),  # they wait no longer together than one after the other
        ([400, 1000], 0),  # 20 ms are no more than the one and a newcomer would wait
        ([400, 1200], 1),
        ([400, 300, 4000], 2),
        ([400, 4000, 4000, 4000, 4000, 4000, 4000], 0),  # six would wait for one
        ([400, 300, 200, 4000, 4000, 4000, 4000, 4000, 4000], 3),
        ([400], 0),
        ([], 0),
    ],
)
def test_a_step_is_cut_where_that_saves_more_waiting_than_it_costs(
    num_left: list[int], cut: int
) -> None:
    """10 ms for a step, 20 µs for a token, 3,000 tokens in one step."""
    assert cut_after(num_left, 3000, 0.01, 20e-6) == cut


def test_a_step_without_a_target_is_filled() -> None:
    assert StepBudget(0.0, 8192).cut_after([400, 8000], 8192, 0) == 0
