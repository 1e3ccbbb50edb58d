"""Steps that engines have taken, from what they wrote down of them."""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.step_fit import Step
from router.types import EngineSnapshot
from serving.step_log import LoggedStep


def steps(
    logs: Sequence[Sequence[LoggedStep]],
    since_s: float,
    prefills_s: Sequence[tuple[float, float]],
    *,
    overlap: bool = False,
) -> list[Step]:
    """Return the steps of all engines that began after `since_s` and of which all is known.

    What a prefilled token attends to is known only where each engine prefilled one prompt at
    a time: in the intervals `prefills_s`. All times are of the monotonic clock.

    Where steps `overlap` (async scheduling), a prefill's time is partly in the step before it,
    and so are its tokens, in other parts (`serving.monitor`): all steps of a prompt are one.
    """
    spans = [_spans(log) for log in logs]
    found = []
    for number, log in enumerate(logs):
        others = [span for other, span in enumerate(spans) if other != number and len(span)]
        num_before = 0  # prefilled in all before the prompt that is being prefilled
        prompt: list[Step] = []  # what was found of it, where steps overlap
        for last, now in itertools.pairwise(log):
            before, after = last.snapshot, now.snapshot
            if before.num_running_reqs == before.num_decoding_reqs:
                num_before = before.num_prefill_tokens_total
            begin_s = now.ended_s - after.step_s
            if prompt and not after.step_num_prefill_tokens:
                found.append(_sum(prompt))
                prompt = []
            if begin_s < since_s or not _is_measured(before, after):
                prompt = []
                continue
            num_pairs = 0.0
            if num_tokens := after.step_num_prefill_tokens:
                if not any(first <= begin_s and now.ended_s <= end for first, end in prefills_s):
                    continue
                num_computed = after.num_prefill_tokens_total - num_before
                num_pairs = num_tokens * (num_computed - num_tokens / 2)
            step = Step(
                num_tokens,
                after.step_num_decode_reqs,
                before.num_decode_context_tokens,
                num_pairs,
                after.step_s,
                _share_beside(others, begin_s, now.ended_s),
            )
            (prompt if overlap and num_tokens else found).append(step)
    return found


def _sum(prompt: Sequence[Step]) -> Step:
    """All steps of a prompt as one, each token of which attends to those before it."""
    num_tokens = sum(step.num_prefill_tokens for step in prompt)
    step_s = sum(step.step_s for step in prompt)
    return Step(
        num_tokens,
        sum(step.num_decode_reqs for step in prompt),
        sum(step.num_decode_context_tokens for step in prompt),
        num_tokens**2 / 2,
        step_s,
        sum(step.share_beside * step.step_s for step in prompt) / step_s,
        len(prompt),
    )


def _is_measured(before: EngineSnapshot, after: EngineSnapshot) -> bool:
    """Whether a step was seen from its beginning, and nobody left in it."""
    return (
        after.num_steps_total == before.num_steps_total + 1
        and before.num_running_reqs > 0
        and after.step_num_decode_reqs == before.num_decoding_reqs
        and after.step_s > 0.0
    )


def _spans(log: Iterable[LoggedStep]) -> np.ndarray:
    """Begin and end of each step, seconds; one row per step."""
    ends = {step.snapshot.num_steps_total: step for step in log}.values()
    return np.array([(each.ended_s - each.snapshot.step_s, each.ended_s) for each in ends])


def _share_beside(others: Sequence[np.ndarray], begin_s: float, end_s: float) -> float:
    """Return in what share of the time between the other engines stepped, their mean."""
    if not others:
        return 0.0
    shares = [
        np.clip(np.minimum(end_s, span[:, 1]) - np.maximum(begin_s, span[:, 0]), 0.0, None).sum()
        for span in others
    ]
    return min(1.0, float(np.mean(shares)) / (end_s - begin_s))
