"""Which engine, when, and whether to wait? The pure core: events and `now_s` in, decisions out.

Synchronous Python without clocks, input or output. Shells carry the decisions out: the gateway
(`serving.gateway.driver`), the simulator (`router.simulation`), the tests. They import from here.
"""

from router.core.carry_out import Shell, carry_out
from router.core.router import Router
from router.core.settings import RouterSettings
from router.core.state import RouterState
from router.resilience.breaker import Failure
from router.types import (
    BlockUpdate,
    Decision,
    Dispatch,
    EngineInfo,
    EngineSnapshot,
    Evacuate,
    Fail,
    Fallback,
    Hold,
    Outcome,
    Reject,
    RejectReason,
    Request,
    RequestClass,
    Usage,
    Withdraw,
)

__all__ = [
    "BlockUpdate",
    "Decision",
    "Dispatch",
    "EngineInfo",
    "EngineSnapshot",
    "Evacuate",
    "Fail",
    "Failure",
    "Fallback",
    "Hold",
    "Outcome",
    "Reject",
    "RejectReason",
    "Request",
    "RequestClass",
    "Router",
    "RouterSettings",
    "RouterState",
    "Shell",
    "Usage",
    "Withdraw",
    "carry_out",
]
