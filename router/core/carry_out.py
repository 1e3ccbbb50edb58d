"""Who does what the router decides? The one executor of decisions, for every shell."""

from collections.abc import Iterable
from typing import Protocol, assert_never

from router.types import (
    Decision,
    Dispatch,
    Evacuate,
    Fail,
    Fallback,
    Hold,
    Reject,
    Withdraw,
)


class Shell(Protocol):
    """What carries decisions out: the gateway's driver, the simulator's gateway, a test's world.

    Each method does one kind of decision, in the order in which the router made them.
    """

    def dispatch(self, decision: Dispatch) -> None: ...
    def withdraw(self, decision: Withdraw) -> None: ...
    def hold(self, decision: Hold) -> None: ...
    def fall_back(self, decision: Fallback) -> None: ...
    def reject(self, decision: Reject) -> None: ...
    def fail(self, decision: Fail) -> None: ...
    def evacuate(self, decision: Evacuate) -> None: ...


def carry_out(decisions: Iterable[Decision], shell: Shell) -> None:
    """Have the shell do what was decided, in that order."""
    for decision in decisions:
        match decision:
            case Dispatch():
                shell.dispatch(decision)
            case Hold():
                shell.hold(decision)
            case Withdraw():
                shell.withdraw(decision)
            case Fallback():
                shell.fall_back(decision)
            case Reject():
                shell.reject(decision)
            case Fail():
                shell.fail(decision)
            case Evacuate():
                shell.evacuate(decision)
            case _:
                assert_never(decision)
