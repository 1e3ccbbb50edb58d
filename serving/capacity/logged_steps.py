"""Which steps have engines taken, by their logs?"""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from router import EngineSnapshot
from serving.capacity.step_fit import Step
from serving.engine.step_log import LoggedStep, read_steps


def read_all(folder: Path) -> list[list[LoggedStep]]:
    """Return the log of each engine in the folder, as far as written."""
    return [list(read_steps(path)) for path in sorted(folder.glob("*.jsonl"))]


def steps(
    logs: Sequence[Sequence[LoggedStep]], since_s: float, *, overlap: bool = False
) -> list[Step]:
    """Return the completely recorded steps of all engines that began after `since_s`.

    `since_s` is of the monotonic clock. Where steps `overlap` (async scheduling), part of a
    prefill's time counts to the step before it, and another part of its tokens
    (`serving.engine.vllm.stats`): all steps between two without prefill are merged into one.
    """
    spans = [_spans(log) for log in logs]
    found = []
    for number, log in enumerate(logs):
        others = [span for other, span in enumerate(spans) if other != number and len(span)]
        prefill: list[Step] = []  # its steps so far, where steps overlap
        for last, now in itertools.pairwise(log):
            before, after = last.snapshot, now.snapshot
            begin_s = now.ended_s - after.step_s
            if prefill and not after.step_num_prefill_tokens:
                found.append(_sum(prefill))
                prefill = []
            if begin_s < since_s or not _is_measured(before, after):
                prefill = []
                continue
            step = Step(
                after.step_num_prefill_tokens,
                after.step_num_decode_reqs,
                before.num_decode_context_tokens,
                after.step_num_prefill_pairs,
                after.step_s,
                _share_beside(others, begin_s, now.ended_s),
            )
            (prefill if overlap and after.step_num_prefill_tokens else found).append(step)
    return found


def _sum(steps: Sequence[Step]) -> Step:
    """Return several steps merged into one."""
    step_s = sum(step.step_s for step in steps)
    return Step(
        sum(step.num_prefill_tokens for step in steps),
        sum(step.num_decode_reqs for step in steps),
        sum(step.num_decode_context_tokens for step in steps),
        sum(step.num_prefill_pairs for step in steps),
        step_s,
        sum(step.share_beside * step.step_s for step in steps) / step_s,
        len(steps),
    )


def _is_measured(before: EngineSnapshot, after: EngineSnapshot) -> bool:
    """Whether a step was recorded from its beginning and no sequence was dropped in it."""
    return (
        after.num_steps_total == before.num_steps_total + 1
        and before.num_running_reqs > 0
        and after.step_num_decode_reqs == before.num_decoding_reqs
        and after.step_s > 0.0
    )


def _spans(log: Iterable[LoggedStep]) -> np.ndarray:
    """Return the begin and the end of each step, seconds, [num_steps, 2]."""
    ends = {step.snapshot.num_steps_total: step for step in log}.values()
    return np.array([(each.ended_s - each.snapshot.step_s, each.ended_s) for each in ends])


def _share_beside(others: Sequence[np.ndarray], begin_s: float, end_s: float) -> float:
    """Return the share of this time in which the other engines stepped, their mean.

    `others`: [num_steps, 2] for each, as of `_spans`.
    """
    if not others:
        return 0.0
    shares = [
        np.clip(np.minimum(end_s, span[:, 1]) - np.maximum(begin_s, span[:, 0]), 0.0, None).sum()
        for span in others
    ]
    return min(1.0, float(np.mean(shares)) / (end_s - begin_s))
