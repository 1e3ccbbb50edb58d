"""What may an engine be sent now?

Filters engines before the policy chooses. What no engine admits waits in the hold
queue, where it can still go to whichever engine has room first.
"""

import enum
import math
from typing import Final

from router.fleet.replica import Replica
from router.types import Request

# For so long the gateway may not know of a change in the engine yet, seconds:
# snapshots are coalesced to 10 ms and arrive within 9 ms at p99 (measured on loopback).
_REACTION_S = 0.02

# Per sequence: KV is given in whole blocks (16 tokens on CUDA, 32 on CPU by our plan).
_ROUNDING_TOKENS = 32

# Where an engine has so much more to prefill than its gateway knew, seconds, another one is worth
# the way, 1 to 2 ms, and what may have come there too. Simulated, seeds 31 and 32: 10, 20 and 50 ms
# do as well, with more bounces or later tails. After so many bounces an engine takes it anyhow.
_WORTH_BOUNCE_S = 0.03
_MAX_BOUNCES = 2


def window_tokens(replica: Replica) -> int:
    """Return the pending prefill tokens below which an engine gets more work.

    Pending tokens count until the step that computes them has ended, so what
    one step prefills is already being worked on. To begin the next step
    without waiting for us, the engine needs what it can prefill in the
    time we take to react on top, though no more than one further step: hence
    between one and two steps. More would only make a later, shorter request
    wait inside the engine, where the router cannot change the order any more.
    """
    num_tokens = replica.chunk_tokens
    return num_tokens + min(num_tokens, int(replica.prefill_tokens_per_s * _REACTION_S))


def accepts_work(replica: Replica) -> bool:
    """Whether anything may be sent to the engine at all."""
    if replica.is_draining or replica.is_quarantined or replica.vital_signs.is_mute:
        return False
    return replica.breaker.admits(replica.info.max_num_seqs)


class Admission(enum.Enum):
    """Which prompts an engine should be sent now, KV blocks aside."""

    UNAVAILABLE = "unavailable"  # none, even if it were empty: see `accepts_work`
    SATURATED = "saturated"  # none until it has computed more of what it has
    SHORT_ONLY = "short_only"  # those that are `Replica.is_short`
    ANY = "any"


# Looked up once: a member costs 0.1 µs each time (Python 3.11), and these are asked for at every
# event.
UNAVAILABLE: Final = Admission.UNAVAILABLE
SATURATED: Final = Admission.SATURATED
SHORT_ONLY: Final = Admission.SHORT_ONLY
ANY: Final = Admission.ANY


def admission(replica: Replica) -> Admission:
    """Return which prompts the engine should be sent now, KV blocks aside.

    An engine with nothing to prefill is always below its window. A hung engine
    becomes saturated by itself: its snapshots stop while its bookings add up. Beside a
    long prompt, which takes a capped part of each step, there is room for short ones:
    these are limited by what the next step would compute already.
    """
    if not accepts_work(replica):
        return UNAVAILABLE
    window = window_tokens(replica)
    if (
        replica.num_sequences >= replica.info.max_num_seqs
        or replica.num_step_demand_tokens >= window
    ):
        return SATURATED
    return ANY if replica.num_pending_prefill_tokens < window else SHORT_ONLY


def kv_need_tokens(request: Request) -> int:
    """Return the KV tokens that a request takes by the predicted end of its answer.

    May exceed the capacity of every engine: an empty engine takes such a prompt, and vLLM
    refuses it with the right message. Of a list of prompts vLLM begins as many as it has room
    for; so that one of them has room is enough, and the list need not wait for an empty engine.
    """
    num_outputs = request.num_booked_output_tokens or request.num_expected_output_tokens
    num_each = num_outputs + _ROUNDING_TOKENS
    num_tokens = request.num_prompt_tokens + request.num_sequences * num_each
    return math.ceil(num_tokens / request.num_prompts)


def max_known_tokens(request: Request, replica: Replica) -> int:
    """Return with how many tokens to prefill the engine is still about what is known of it here.

    With more it gives the request back as busy: another gateway has sent it something meanwhile.
    0 for a request that it has to take in any case.
    """
    if request.tried or request.num_bounces >= _MAX_BOUNCES:
        return 0
    num_worth = int(_WORTH_BOUNCE_S / max(1e-9, replica.token_s))
    return max(1, replica.num_pending_prefill_tokens + num_worth)


def meets_tpot_target(request: Request, replica: Replica, tpot_target_s: float) -> bool:
    """Whether time per output token there stays within its target when the request decodes, too.

    For the choice between engines. Where none meets it, the request is not held for that:
    waiting would not make its decoding any faster.
    """
    return replica.tpot_s(request.num_sequences) <= tpot_target_s
