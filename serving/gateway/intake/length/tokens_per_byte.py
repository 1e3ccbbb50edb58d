"""How many tokens does a byte of text have, as learned from what vLLM has counted?"""

import math

# Used until the first replies show better: English text in a byte-pair
# vocabulary has about four bytes per token.
PRIOR_TOKENS_PER_BYTE = 0.25
# The prior weighs as much as this many bytes of real prompts.
_PRIOR_BYTES = 2_000.0
# Older prompts count less and less: about the last 200 KB of prompt text matter.
_MEMORY_BYTES = 200_000.0


class TokensPerByte:
    """One ratio for all prompts of a gateway."""

    def __init__(self) -> None:
        self._num_tokens = PRIOR_TOKENS_PER_BYTE * _PRIOR_BYTES
        self._num_bytes = _PRIOR_BYTES

    @property
    def ratio(self) -> float:
        """Tokens per byte of JSON text."""
        return self._num_tokens / self._num_bytes

    def learn(self, num_text_bytes: int, num_tokens: int) -> None:
        """Learn from how many tokens a prompt of so many bytes really was."""
        if num_text_bytes and num_tokens:
            keep = math.exp(-num_text_bytes / _MEMORY_BYTES)
            self._num_tokens = keep * self._num_tokens + num_tokens
            self._num_bytes = keep * self._num_bytes + num_text_bytes
