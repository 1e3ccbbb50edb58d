"""How much may an engine prefill in one step?

Who is being answered gets one token per step, and who comes waits for the end of the step that
runs. So a step with prefill should not last longer than a reader is to wait for the next token:
the ITL target. As many tokens as fit into that follow from what steps have taken so far.
"""

from collections.abc import Sequence

from router.estimators.step_time import StepModel

# The longest gap between tokens that somebody else's prompt should cause: 7 tokens per second, as
# fast as people read. Where an 8B model runs on an H100 that is nearly what 8,192 tokens take;
# smaller steps cost long prompts, and what short ones gain by them they have by `cut_after`
# (docs/routing.md). It matters where such steps take seconds: larger models, slower GPUs.
ITL_TARGET_S = 0.15

# A step costs something without any prefill, and a prompt in many small parts pays it many times.
# Where that leaves little of the target, as on a CPU, or beside many long contexts, prefill still
# takes five sixths of a step.
_MIN_PREFILL_RATIO = 5.0
_MIN_TOKENS = 16  # a KV block

# A prompt that takes several steps is left out of every second one while more urgent ones wait: for
# them there is room, of which it counts for this part.
_LONG_PART = 4

# Who waits is looked at so far to find out where a step is cut: so many prompts that take more
# than a step, one after the other, fill steps for longer than anything is planned ahead.
MAX_AHEAD = 8


def step_prefill_tokens(
    overhead_s: float, token_s: float, itl_target_s: float, max_tokens: int
) -> int:
    """Return the tokens that a step may prefill beside the sequences that decode in it, ≥ 1.

    `overhead_s`: what the step takes without prefill. `token_s`: per prefilled token.
    `itl_target_s`: 0 for no limit but `max_tokens`.
    """
    if not itl_target_s:
        return max(1, max_tokens)
    prefill_s = max(itl_target_s - overhead_s, _MIN_PREFILL_RATIO * overhead_s)
    if prefill_s >= max_tokens * token_s:
        return max(1, max_tokens)
    return max(1, min(max_tokens, max(_MIN_TOKENS, int(prefill_s / token_s))))


def long_part_tokens(num_tokens: int) -> int:
    """Return what of the next step a prompt takes from others that needs several, tokens, ≥ 1."""
    return max(1, num_tokens // _LONG_PART)


def gives_way(
    num_running: int, num_waiting: int, running_priority: int, priority: int, num_step: int
) -> bool:
    """Whether a prompt that runs is left out of a step for the one that is next of those waiting.

    It is where the other one is more urgent, its priority lower, and not all fit into the
    `num_step` tokens that the step prefills. `num_running`: tokens that all running prompts have
    left; `num_waiting`: those of the other one.
    """
    return running_priority > priority and num_running + num_waiting > num_step


def cut_after(num_left: Sequence[int], num_step: int, overhead_s: float, token_s: float) -> int:
    """Return after how many prompts the next step is cut, in their order; 0: it is filled.

    `num_left`: tokens that each prompt has left. `num_step`: what is filled. All prompts that a
    step ends have their first token at its end, so whatever is added to them makes them wait.
    Left to a step of its own it waits for `overhead_s` more itself, and so does everybody behind
    it, and one who comes meanwhile: while one prompt is computed about one comes where engines
    have much to do. The cut is where the sum of all waits is least: batches with a set-up time
    (Coffman, Yannakakis, Magazine and Santos 1990), looked at one step ahead.
    """
    num_full = min(num_step, sum(num_left))
    cut, most_s, num_before = 0, 0.0, 0
    for number in range(1, len(num_left)):
        num_before += num_left[number - 1]
        if num_before >= num_full:
            break
        saved_s = number * (num_full - num_before) * token_s
        saved_s -= (len(num_left) - number + 1) * overhead_s
        if saved_s > most_s:
            cut, most_s = number, saved_s
    return cut


class StepBudget:
    """What each step of one engine may prefill, by the times that its steps have taken.

    Both vLLM's scheduler (`serving.engine.vllm.scheduler`) and the simulator's ask it. It learns
    from steps with prefill alone: with less to read there is less to do for them, and only
    those are to be predicted.
    """

    __slots__ = ("_itl_target_s", "_max_tokens", "_model")

    def __init__(self, itl_target_s: float, max_num_batched_tokens: int) -> None:
        self._itl_target_s = itl_target_s
        self._max_tokens = max_num_batched_tokens
        self._model = StepModel()

    def learn(self, step_s: float, num_prefill_tokens: int, num_decode_reqs: int) -> None:
        """Learn from a step that has ended."""
        if num_prefill_tokens and self._itl_target_s:
            self._model.learn_step(step_s, num_prefill_tokens, num_decode_reqs)

    def prefill_tokens(self, num_decode_reqs: int) -> int:
        """Return the tokens that the next step may prefill beside so many decoding sequences."""
        model = self._model
        return step_prefill_tokens(
            model.step_s(0, num_decode_reqs),
            model.token_s,
            self._itl_target_s,
            self._max_tokens - num_decode_reqs,
        )

    def cut_after(self, num_left: Sequence[int], num_step: int, num_decode_reqs: int) -> int:
        """Return after how many of these prompts the next step is cut, 0 if it is filled.

        `num_step`: tokens that it may prefill, beside so many decoding sequences.
        """
        if not self._itl_target_s or len(num_left) < 2:
            return 0
        model = self._model
        return cut_after(num_left, num_step, model.step_s(0, num_decode_reqs), model.token_s)
