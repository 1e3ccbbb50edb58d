"""How much of an engine's step may one prompt take?"""

# A step costs something whatever is in it: as much as prefilling some 150 tokens on an H100
# with an 8B model, 20 on a CPU core with SmolLM2 (serving/capacity/profiles). In steps of about
# seven times that, it is a seventh of the time of a prompt that prefills alone.
_SHARE = 8
_MIN_TOKENS = 128


def prefill_chunk_tokens(max_num_batched_tokens: int) -> int:
    """Return the tokens of a step that one prompt may take: an eighth of the step's budget.

    On an H100 that is 1,024 tokens or 25 ms, where a whole budget of 8,192 is 0.19 s for
    which a short prompt may have to wait. Not less than 128 tokens, unless they were more
    than half of the budget.
    """
    half = max(1, max_num_batched_tokens // 2)
    return max(min(_MIN_TOKENS, half), max_num_batched_tokens // _SHARE)
