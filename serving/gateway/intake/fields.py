"""Which fields of a body does the gateway read, and what does vLLM take them for?

vLLM reads a body by pydantic's lax rules: "yes", "on" and 1 are true, "12" and true are integers.
Here pydantic reads the same fields by the same types, so that sizes, cache keys and calls to
providers go by what the engine will do. Fields that are not named here are vLLM's alone.
"""

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from router import RequestClass

# What vLLM's transport can bear: beyond it a request would fail in the engine, with status 500.
_Int = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
# vLLM's own bounds of a salt (`validate_cache_salt`).
_Salt = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^@/\\\x00]*$")]


_CLASSES = {each.value: each for each in RequestClass}


class Fields(BaseModel):
    """What all endpoints have in common."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    generates: ClassVar[bool] = False  # tokens
    logprobs_field: ClassVar[str] = ""

    model: str | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=2**63 - 1)] | None = None
    priority: _Int = 0  # lower is first
    request_id: str | None = None
    cache_salt: _Salt | None = None
    priority_class: Any = None  # ours; to vLLM a field that it does not know
    # Names of a conversation, vLLM's own and OpenAI's hint for its cache. Not OpenAI's `user`: that
    # may be one for all of an application, whose conversations should not crowd one engine.
    session_id: Any = None
    prompt_cache_key: Any = None

    @property
    def request_class(self) -> RequestClass | None:
        """The class that the body names; None if it names none that we know."""
        return _CLASSES.get(self.priority_class) if isinstance(self.priority_class, str) else None

    @property
    def session(self) -> str:
        """What the body says that it belongs to; empty if it says nothing."""
        for name in (self.session_id, self.prompt_cache_key):
            if isinstance(name, str) and name:
                return name
        return ""

    @property
    def least_tokens(self) -> int:
        """What each choice must have at least."""
        return 0

    @property
    def is_stream(self) -> bool:
        """Whether the reply comes in events."""
        return False

    @property
    def is_deterministic(self) -> bool:
        """Whether the same request gets the same answer."""
        return True

    @property
    def num_choices(self) -> int:
        """Sequences that are generated for each prompt."""
        return 1

    @property
    def output_limit(self) -> tuple[str, int | None]:
        """The field that limits the tokens of each choice, and what it says; None: no limit."""
        return "", 0

    @property
    def num_token_logprobs(self) -> int | None:
        """Log probabilities per generated token: -1 for the whole vocabulary, None for none."""
        return None

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Log probabilities per prompt token: -1 for the whole vocabulary, None for none."""
        return None

    def given(self) -> dict[str, Any]:
        """Return what the body says, without nulls, by field and as vLLM takes it."""
        return {
            name: value
            for name in self.model_fields_set
            if name != "priority_class" and (value := getattr(self, name)) is not None
        }


class _GenerationFields(Fields):
    """What the endpoints that generate have in common."""

    generates = True
    logprobs_field = "top_logprobs"

    stream: bool | None = False
    temperature: float | None = None
    seed: _Int | None = None
    top_k: _Int | None = None

    @property
    def is_stream(self) -> bool:
        return bool(self.stream)

    @property
    def is_deterministic(self) -> bool:
        return self.temperature == 0.0 or self.seed is not None


class _SamplingFields(_GenerationFields):
    """What chat and completions have in common."""

    n: _Int | None = 1
    max_tokens: _Int | None = None
    min_tokens: _Int = 0
    echo: bool | None = False
    prompt_logprobs: _Int | None = None
    logprob_token_ids: list[_Int] | None = None

    @property
    def least_tokens(self) -> int:
        return self.min_tokens

    @property
    def num_choices(self) -> int:
        return 1 if self.n is None else self.n


class ChatFields(_SamplingFields):
    """Of `/v1/chat/completions`."""

    max_completion_tokens: _Int | None = None
    logprobs: bool | None = False
    top_logprobs: _Int | None = 0

    @property
    def output_limit(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    @property
    def num_token_logprobs(self) -> int | None:
        if not self.logprobs:
            return None
        return len(self.logprob_token_ids or ()) or self.top_logprobs or 0

    @property
    def num_prompt_logprobs(self) -> int | None:
        is_echo = self.prompt_logprobs is None and self.echo
        return self.top_logprobs or 0 if is_echo else self.prompt_logprobs


class CompletionFields(_SamplingFields):
    """Of `/v1/completions`."""

    logprobs_field = "logprobs"

    max_tokens: Annotated[_Int, BeforeValidator(lambda value: 16 if value is None else value)] = 16
    logprobs: _Int | None = None

    @property
    def output_limit(self) -> tuple[str, int | None]:
        if self.max_tokens == 0 and self.echo:
            return "max_tokens", 1  # vLLM generates one, and leaves it out
        return "max_tokens", self.max_tokens

    @property
    def num_token_logprobs(self) -> int | None:
        return len(self.logprob_token_ids or ()) or self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        is_echo = self.prompt_logprobs is None and self.echo
        return self.logprobs if is_echo else self.prompt_logprobs


class ResponseFields(_GenerationFields):
    """Of `/v1/responses`."""

    max_output_tokens: _Int | None = None
    previous_response_id: str | None = None
    store: bool | None = True
    background: bool | None = False
    include: list[Any] | None = None
    top_logprobs: _Int | None = 0

    @property
    def output_limit(self) -> tuple[str, int | None]:
        return "max_output_tokens", self.max_output_tokens

    @property
    def num_token_logprobs(self) -> int | None:
        if "message.output_text.logprobs" not in (self.include or ()):
            return None
        return self.top_logprobs or 0


class EmbeddingFields(Fields):
    """Of `/v1/embeddings`: nothing is generated."""


class RankingFields(Fields):
    """Of the endpoints that score, rank, classify and pool, which generate nothing either."""


class MessageFields(Fields):
    """Of Anthropic's `/v1/messages`, which has no seed."""

    generates = True

    max_tokens: _Int | None = None
    stream: bool | None = False
    temperature: float | None = None
    top_k: _Int | None = None
    metadata: Any = None  # its `user_id` names the session, where Claude Code asks

    @property
    def session(self) -> str:
        user = self.metadata.get("user_id") if isinstance(self.metadata, dict) else None
        return super().session or (user if isinstance(user, str) else "")

    @property
    def is_stream(self) -> bool:
        return bool(self.stream)

    @property
    def is_deterministic(self) -> bool:
        return self.temperature == 0.0

    @property
    def output_limit(self) -> tuple[str, int | None]:
        return "max_tokens", self.max_tokens


class CohereChatFields(MessageFields):
    """Of Cohere's `/cohere/v2/chat`."""

    seed: _Int | None = None

    @property
    def is_deterministic(self) -> bool:
        return self.temperature == 0.0 or self.seed is not None


class SpeechFields(_GenerationFields):
    """Of `/v1/audio/*`: a form."""

    max_completion_tokens: _Int | None = None

    @property
    def output_limit(self) -> tuple[str, int | None]:
        return "max_completion_tokens", self.max_completion_tokens


class TokenFields(_GenerationFields):
    """Of `/inference/v1/generate`: how to sample is an object of its own."""

    sampling_params: CompletionFields = CompletionFields()

    @property
    def is_deterministic(self) -> bool:
        return self.sampling_params.is_deterministic

    @property
    def num_choices(self) -> int:
        return self.sampling_params.num_choices

    @property
    def output_limit(self) -> tuple[str, int | None]:
        return self.sampling_params.output_limit

    @property
    def num_token_logprobs(self) -> int | None:
        return self.sampling_params.num_token_logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        return self.sampling_params.num_prompt_logprobs
