"""The one executor: each kind of decision reaches the one method that is meant for it."""

from typing import get_args

import pytest

from router.core.carry_out import Shell, carry_out
from router.types import (
    Decision,
    Dispatch,
    Evacuate,
    Fail,
    Fallback,
    Hold,
    Reject,
    RejectReason,
    Withdraw,
)

EACH = {
    "dispatch": Dispatch("a", "r0", 1),
    "withdraw": Withdraw("a", "r0", 1),
    "hold": Hold("a"),
    "fall_back": Fallback("a", "p0", "default"),
    "reject": Reject("a", RejectReason.EXPIRED),
    "fail": Fail("a"),
    "evacuate": Evacuate("r0", "hung"),
}


class Recorder:
    """Notes which method was called with what."""

    def __init__(self) -> None:
        self.called: list[tuple[str, Decision]] = []

    def __getattr__(self, name: str):
        return lambda decision: self.called.append((name, decision))


def test_every_kind_has_its_method_and_the_order_is_kept():
    assert {type(decision) for decision in EACH.values()} == set(get_args(Decision))
    assert {name for name in vars(Shell) if not name.startswith("_")} == set(EACH)
    recorder = Recorder()
    carry_out(list(EACH.values()), recorder)
    assert recorder.called == list(EACH.items())


def test_what_is_no_decision_is_not_passed_over():
    with pytest.raises(AssertionError):
        carry_out(["dispatch"], Recorder())
