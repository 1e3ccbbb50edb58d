"""What does one request use in its engine, from submission to its end?"""

from collections.abc import Callable
from contextvars import ContextVar

from router import Usage
from router.resilience.resume import Resume
from serving.stream.record import Recorder


class RequestAccounting:
    """Tokens of one request, kept while the replica has it.

    Until vLLM has tokenised the prompt and registered the request
    (`entered`), the gateway's estimate stands in for its size, so that a
    request is never missing from a snapshot that acknowledges its booking.
    """

    __slots__ = (
        "created_s",
        "entered",
        "has_diverged",
        "has_grammar",
        "is_parked",
        "last_block",
        "num_cached_tokens",
        "num_expected_cached_tokens",
        "num_ids",
        "num_output_tokens",
        "num_prompt_tokens",
        "on_prompt",
        "priority",
        "recorder",
        "request_id",
        "resume",
    )

    def __init__(
        self,
        num_prompt_tokens: int,
        priority: int = 0,
        *,
        num_expected_cached_tokens: int = 0,
        request_id: str = "",
        created_s: int = 0,
        resume: Resume | None = None,
        on_prompt: Callable[[int, list[int]], None] | None = None,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_progress` is called when what is recorded should be sent though no body is due."""
        self.num_prompt_tokens = num_prompt_tokens
        self.priority = priority  # vLLM's: lower is first
        # The router's estimate, used until vLLM schedules the prompt and looks it up itself.
        self.num_expected_cached_tokens = num_expected_cached_tokens
        # Called once, with size and block hashes, when vLLM has tokenised the prompt.
        self.on_prompt = on_prompt
        self.num_cached_tokens = 0
        self.num_output_tokens = 0
        self.last_block = 0  # hash of the last whole KV block of prompt and answer; 0: not known
        self.entered = False
        self.has_grammar = False  # its reply has to follow one
        self.is_parked = False  # it waits for something else than to be computed
        self.request_id = request_id
        self.created_s = created_s  # what the response says, seconds since the epoch
        self.num_ids = 0  # random ids that the API layer has asked for
        self.resume = resume  # how far another engine has come; None: the request is new
        self.has_diverged = False  # generated again, its tokens differ from those sent before
        self.recorder = Recorder(on_progress)

    def usage(self) -> Usage | None:
        """Return what vLLM counted; None if the request never reached the engine."""
        if not self.entered:
            return None
        return Usage(
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            num_output_tokens=self.num_output_tokens,
            last_block=self.last_block,
        )


# Set in the task that runs a request: vLLM's layers hand no object of ours
# through to the engine, but context variables pass through all of them.
current_accounting: ContextVar[RequestAccounting | None] = ContextVar(
    "current_accounting", default=None
)
