"""What one request takes in its engine, from submission to end."""

from contextvars import ContextVar

from router.types import Usage


class Account:
    """Tokens of one request, kept while the replica has it.

    Until vLLM has tokenised the prompt and registered the request
    (`entered`), the gateway's estimate stands in for its size, so that a
    request is never missing from a snapshot that acknowledges its booking.
    """

    __slots__ = (
        "entered",
        "num_cached_tokens",
        "num_output_tokens",
        "num_prompt_tokens",
        "priority",
    )

    def __init__(self, num_prompt_tokens: int, priority: int = 0) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.priority = priority  # vLLM's: lower is first
        self.num_cached_tokens = 0
        self.num_output_tokens = 0
        self.entered = False

    def usage(self) -> Usage | None:
        """What vLLM counted; None if the request never came as far as the engine."""
        if not self.entered:
            return None
        return Usage(
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            num_output_tokens=self.num_output_tokens,
        )


# Set in the task that runs a request: vLLM's layers hand no object of ours
# through to the engine, but context variables pass through all of them.
current_account: ContextVar[Account | None] = ContextVar("current_account", default=None)
