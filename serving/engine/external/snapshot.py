"""What state is a server in that tells its own only now and then?

Of what we have sent there we know more than its metrics: which requests have had their first
token, in the moment it comes. What others have sent is the rest of what it counts. So of pending
prefill, which vLLM's metrics do not have, ours is exact to a token's way here, and that of others
is their number times a usual prompt. Requests that do not stream show no first token: they count
as prefilled once the server has had as many first tokens as were due before and with theirs.
"""

from collections.abc import Collection
from typing import Protocol

import msgspec

from router import EngineInfo, EngineSnapshot
from serving.engine.external.metrics import Metrics

_MAX_PERIOD_S = 2.0  # after which steps are counted although prompts are being computed
_MIN_STEPS = 5  # in it: else a step that it began or ended in weighs too much
_BLIND_PREFILL_S = 1.0  # in which a request counts as prefilled where nothing tells


class Sent(Protocol):
    """One request that we have sent there, and that has not ended."""

    stream: int
    num_prompt_tokens: int
    num_new_tokens: int
    num_output_tokens: int
    has_token: bool
    is_streamed: bool
    sent_s: float
    num_ahead: int


class Poll(msgspec.Struct, frozen=True):
    """One look at the metrics."""

    metrics: Metrics
    asked_s: float
    answered_s: float
    num_others: int  # requests that are not ours
    was_busy: bool  # ours kept it at work from the look before to this one


class Steps(msgspec.Struct, frozen=True):
    """The mean of the steps between two looks."""

    step_s: float = 0.0
    num_prefill_tokens: int = 0
    num_decode_reqs: int = 0


class StepPeriods:
    """Between which looks can steps be averaged? The model of step times is linear: means teach.

    vLLM counts a prompt's tokens all at once, when its prefill ends. So a period begins and ends
    with nothing to prefill; where there always is something, it ends after a while all the same,
    and what it counts wrongly at its ends weighs little.
    """

    def __init__(self) -> None:
        self._start: Poll | None = None

    def add(self, poll: Poll, *, is_prefilling: bool) -> Steps:
        """Take in a look. Return the mean step of the period that it ends; zeros if none."""
        start = self._start
        if start is None or not poll.was_busy or poll.metrics.num_steps < start.metrics.num_steps:
            self._start = None if is_prefilling and not poll.was_busy else poll
            return Steps()
        span_s = poll.answered_s - start.answered_s
        num_steps = poll.metrics.num_steps - start.metrics.num_steps
        is_long = span_s >= _MAX_PERIOD_S and num_steps >= _MIN_STEPS
        if not num_steps or (is_prefilling and not is_long):
            return Steps()
        self._start = poll
        num_computed = poll.metrics.num_computed_tokens - start.metrics.num_computed_tokens
        num_output = poll.metrics.num_output_tokens - start.metrics.num_output_tokens
        return Steps(
            span_s / num_steps,
            round(max(0, num_computed) / num_steps),
            max(1, round(max(0, num_output) / num_steps)),
        )


def is_prefilled(sent: Sent, poll: Poll | None, now_s: float) -> bool:
    """Whether a request has had its first token, as far as can be told."""
    if sent.has_token:
        return True
    if sent.is_streamed:
        return False
    if poll is None:
        return now_s - sent.sent_s > _BLIND_PREFILL_S
    return poll.asked_s > sent.sent_s and poll.metrics.num_first_tokens > sent.num_ahead


def make_snapshot(
    info: EngineInfo,
    sent: Collection[Sent],
    poll: Poll | None,
    *,
    seq: int,
    last_booking: int,
    num_steps: int,
    steps: Steps,
    now_s: float,
) -> EngineSnapshot:
    """Return the state by the last look and by what we have sent.

    `num_steps` that the server has made, as far as we have seen: tokens that came count, too.
    """
    num_pending = num_decoding = num_context = num_since = 0
    for each in sent:
        if is_prefilled(each, poll, now_s):
            num_decoding += 1
            num_tokens = each.num_prompt_tokens + each.num_output_tokens
            num_context += num_tokens
            if poll is None or each.sent_s > poll.asked_s:
                num_since += num_tokens  # its blocks are not in the last look
        else:
            num_pending += each.num_new_tokens
    metrics = poll.metrics if poll is not None else Metrics()
    num_others = poll.num_others if poll is not None else 0
    num_others_waiting = min(num_others, metrics.num_waiting)
    num_others_decoding = num_others - num_others_waiting
    num_pending += round(num_others_waiting * metrics.mean_prompt_tokens)
    num_context += round(num_others_decoding * metrics.mean_prompt_tokens)
    num_sequences = len(sent) + num_others
    usage = metrics.kv_cache_usage
    if poll is None:
        usage, num_since = min(1.0, num_context / max(1, info.num_kv_tokens)), 0
    num_free = max(0, round(info.num_kv_tokens * (1.0 - usage)) - num_since)
    num_waiting = min(metrics.num_waiting, num_sequences)
    return EngineSnapshot(
        seq=seq,
        last_booking=last_booking,
        num_running_reqs=num_sequences - num_waiting,
        num_waiting_reqs=num_waiting,
        num_inflight_reqs=num_sequences,
        kv_cache_usage=usage,
        num_free_kv_tokens=num_free,
        num_pending_prefill_tokens=num_pending,
        num_step_demand_tokens=num_pending,
        num_decoding_reqs=num_decoding + num_others_decoding,
        num_decode_context_tokens=num_context,
        prefill_tokens_per_s=metrics.prefill_tokens_per_s,
        step_s=steps.step_s,
        step_num_prefill_tokens=steps.num_prefill_tokens,
        step_num_decode_reqs=steps.num_decode_reqs,
        num_prefill_tokens_total=metrics.num_computed_tokens,
        num_prefix_queries_total=metrics.num_prefix_queries,
        num_prefix_hits_total=metrics.num_prefix_hits,
        num_preemptions_total=metrics.num_preemptions,
        num_output_tokens_total=metrics.num_output_tokens,
        num_steps_total=num_steps,
    )
