"""How much may an engine prefill in one step?

Who is being answered gets one token per step, and who comes waits for the end of the step that
runs. So a step with prefill should not last longer than a reader is to wait for the next token:
the ITL target. As many tokens as fit into that follow from what steps have taken so far.
"""

from router.estimators.step_time import StepModel

# The longest gap between tokens that somebody else's prompt should cause: 13 tokens per second,
# twice as fast as people read. Stock engines of 8,192 tokens a step leave gaps of 80 to 190 ms at
# p99 where an 8B model runs on an H100 (docs/simulator.md).
ITL_TARGET_S = 0.075

# A step costs something without any prefill, and a prompt in many small parts pays it many times.
# Where that leaves little of the target, as on a CPU, or beside many long contexts, prefill still
# takes five sixths of a step.
_MIN_PREFILL_RATIO = 5.0
_MIN_TOKENS = 16  # a KV block

# A prompt that takes several steps is left out of every second one while more urgent ones wait: for
# them there is room, of which it counts for this part.
_LONG_PART = 4


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
