"""How much of what prompts consist of do engines hold already?"""

# A request counts 1/e after so many later ones. Of shares that differ as much as they can from one
# to the next the mean is then known to 0.06.
_MEMORY_REQUESTS = 64.0


class PrefixReuse:
    """Shares of the prompt tokens of each model that were expected to be cached where they went.

    Of names that engines serve, so there are no more of them than engines have.
    """

    __slots__ = ("_num_cached", "_num_tokens")

    def __init__(self) -> None:
        self._num_cached: dict[str, float] = {}  # both by model, decayed
        self._num_tokens: dict[str, float] = {}

    def record_placed(self, model: str, num_prompt_tokens: int, num_cached_tokens: int) -> None:
        """Count a request that goes to an engine."""
        keep = 1.0 - 1.0 / _MEMORY_REQUESTS
        self._num_tokens[model] = keep * self._num_tokens.get(model, 0.0) + num_prompt_tokens
        self._num_cached[model] = keep * self._num_cached.get(model, 0.0) + num_cached_tokens

    def share(self, model: str) -> float:
        """Return the share of prompt tokens that were cached lately, 0-1; 0 if nothing is known."""
        num_tokens = self._num_tokens.get(model, 0.0)
        return self._num_cached[model] / num_tokens if num_tokens > 0.0 else 0.0

    def forget(self, model: str) -> None:
        """Forget a name that no engine serves any more."""
        self._num_tokens.pop(model, None)
        self._num_cached.pop(model, None)
