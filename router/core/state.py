"""What can be seen of the router from outside?"""

import msgspec

from router.fleet.prompt_blocks import PrefixMemoryState
from router.fleet.replica import ReplicaState
from router.providers.spillover import SpilloverState
from router.queueing.hold_queue import HoldQueueState
from router.resilience.breaker import BreakerEvent
from router.resilience.retry_budget import RetryBudgetState
from router.resilience.suspects import SuspectsState
from router.scheduling.hedging import HedgingState
from router.scheduling.predictions import LengthsState, PredictionsState


class RetriesState(msgspec.Struct, frozen=True, kw_only=True):
    """How often requests were sent on, and how often they still may be."""

    num_made: int  # attempts beyond the first, resumptions included
    budget: RetryBudgetState
    num_bounced: int  # given back by engines as busy, and placed again: none of these is a retry


class RouterState(msgspec.Struct, frozen=True, kw_only=True):
    """Everything worth knowing about the router at one moment.

    Every number is finite: JSON knows no infinity, and none is written as null.
    """

    policy: str
    ablate: list[str]  # parts of it that are switched off
    holds: bool  # whether requests wait here until an engine has room
    replicas: dict[str, ReplicaState]  # by id
    held: HoldQueueState
    is_overloaded: dict[str, bool]  # by model: whether whoever would be late is refused
    num_placed: int  # requests at engines
    prefix_memory: PrefixMemoryState  # which text became which KV blocks
    outcomes: dict[str, int]  # by `router.types.Outcome`, since the start
    is_by_arrival: bool  # whether the queue is in order of arrival
    accuracy: PredictionsState
    accuracy_by_model: dict[str, PredictionsState]  # by its own name, aliases included
    lengths: LengthsState
    fallback: SpilloverState
    hedges: HedgingState
    suspects: SuspectsState
    retries: RetriesState
    breaker_events: list[BreakerEvent]  # the last ones of all engines, oldest first
