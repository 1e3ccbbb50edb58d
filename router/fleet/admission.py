"""How much an engine is given before it has asked for more.

Filters before the policy chooses. What no engine admits waits in the hold
queue, where it can still go to whichever engine frees up first.
"""

import enum

from router.fleet.replica import Replica
from router.types import Request

# Time in which the gateway must be expected to miss a change in the engine:
# snapshots are coalesced to 10 ms and arrive within 9 ms at p99 (measured on loopback).
_REACTION_S = 0.02

# Per sequence: KV is given in whole blocks (16 tokens on CUDA, 32 on CPU by our plan).
_ROUNDING_TOKENS = 32


def window_tokens(replica: Replica) -> int:
    """Prefill tokens below which an engine gets more, tokens.

    Pending tokens count until the step that computes them has ended, so up to
    one step's budget of them is already being worked on. To begin the next
    step without waiting for us, the engine needs what it can prefill in the
    time we take to react on top, though no more than one further step: hence
    between one and two budgets. More would only make a later, shorter request
    wait inside the engine, where nothing can be changed any more.
    """
    budget = replica.info.max_num_batched_tokens
    return budget + min(budget, int(replica.prefill_tokens_per_s * _REACTION_S))


def accepts_work(replica: Replica) -> bool:
    """Whether anything at all may be sent to the engine."""
    return not replica.is_draining and replica.breaker.admits(replica.info.max_num_seqs)


class Admission(enum.Enum):
    """What an engine should be sent now, KV blocks aside."""

    UNAVAILABLE = "unavailable"  # nothing, whatever happens to what it has
    SATURATED = "saturated"  # nothing yet
    SHORT_ONLY = "short_only"  # prompts that are `Replica.is_short`
    ANY = "any"


def admission(replica: Replica) -> Admission:
    """What the engine should be sent now, KV blocks aside.

    An engine with nothing to prefill is always below its window. A hung engine
    closes by itself: its snapshots stop while its bookings add up. Beside a long
    prompt, which takes a capped part of each step, there is room for short ones:
    what counts for these is what the next step would compute already.
    """
    if not accepts_work(replica):
        return Admission.UNAVAILABLE
    window = window_tokens(replica)
    if (
        replica.num_sequences >= replica.info.max_num_seqs
        or replica.num_step_demand_tokens >= window
    ):
        return Admission.SATURATED
    return Admission.ANY if replica.num_pending_prefill_tokens < window else Admission.SHORT_ONLY


def kv_need_tokens(request: Request) -> int:
    """KV room the request takes by the predicted end of its answer, tokens.

    May exceed the capacity of every engine: such a prompt is vLLM's to refuse,
    with the right message, and an empty engine takes it.
    """
    num_each = request.num_expected_output_tokens + _ROUNDING_TOKENS
    return request.num_prompt_tokens + request.num_sequences * num_each


def keeps_pace(request: Request, replica: Replica, tpot_target_s: float) -> bool:
    """Whether the request, decoding there, leaves time per output token at its target.

    Chooses between engines; where none does, nobody is held for it: waiting
    would not make decoding any faster for the request itself.
    """
    return replica.tpot_s(request.num_sequences) <= tpot_target_s
