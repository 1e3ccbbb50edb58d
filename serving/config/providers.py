"""Which services elsewhere may answer, and under which keys?"""

from typing import Any, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from router.providers.settings import KeySettings, ProviderSettings
from serving.config.section import AbsolutePath, Section


class ProviderKeyConfig(KeySettings):
    """One API key of a provider: where it is, and what may be sent under it."""

    env: str | None = Field(None, description="environment variable of the gateway that holds it")
    file: AbsolutePath | None = Field(
        None, description="file that holds it and nothing else; relative to the config file"
    )

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.env is not None and self.file is not None:
            raise ValueError("env and file: only one of them says where the key is")
        return self


class ProviderConfig(ProviderSettings):
    """A service elsewhere that answers what our engines cannot."""

    kind: Literal["openai", "litellm"] = Field(
        "openai",
        description="openai: any OpenAI-compatible HTTP service; litellm: what the package "
        "litellm supports (Anthropic, Gemini, Bedrock, …), chat completions only",
    )
    url: str | None = Field(
        None,
        pattern=r"^https?://[^\s@]+$",
        description="base URL up to /v1, e.g. https://api.openai.com/v1",
    )
    keys: tuple[ProviderKeyConfig, ...] = Field(
        (ProviderKeyConfig(),), min_length=1, description="API keys, each with limits of its own"
    )
    headers: dict[str, str] = Field(
        default_factory=dict, description="further headers, e.g. OpenAI-Organization; no secrets"
    )
    defaults: dict[str, Any] = Field(
        default_factory=dict, description="fields of the body that a client's request lacks"
    )
    asks_usage: bool = Field(
        True,
        description="ask streams to end with their usage (stream_options); without it the whole "
        "reservation is recorded as used",
    )
    connect_timeout_s: float = Field(5.0, gt=0, description="time to connect, seconds")
    first_token_timeout_s: float = Field(
        30.0, gt=0, description="time from sending to the first token of a stream, seconds"
    )
    stall_timeout_s: float = Field(
        30.0, gt=0, description="longest time between two chunks, seconds"
    )
    whole_timeout_s: float = Field(
        600.0, gt=0, description="time for a reply that is not streamed, seconds"
    )

    @model_validator(mode="after")
    def _check_provider(self) -> Self:
        if self.kind == "openai" and self.url is None:
            raise ValueError("url: must be set")
        names = [key.name for key in self.keys]
        if len(set(names)) < len(names):
            raise ValueError("keys: each needs a name of its own")
        return self

    @field_validator("url")
    @classmethod
    def _strip_url(cls, url: str | None) -> str | None:
        return url.rstrip("/") if url is not None else None


class ExternalConfig(Section):
    """A server that runs already, `vllm serve` or alike: one engine more, which we do not start."""

    url: str = Field(
        pattern=r"^https?://[^\s@]+$", description="where it listens, e.g. http://a:8000"
    )
    model: str | None = Field(
        None,
        description="the name that clients ask for; unset: the names that the server has. One of "
        "another name means its only model",
    )
    key: SecretStr | None = Field(None, description="API key that the server wants")
    key_env: str | None = Field(None, description="environment variable that holds the key")
    ca_file: AbsolutePath | None = Field(
        None, description="PEM file of who has signed its certificate; unset: the system's"
    )
    max_num_seqs: int = Field(
        256, ge=1, description="sequences in one step of its scheduler, which it does not tell"
    )
    max_num_batched_tokens: int = Field(
        2048, ge=1, description="tokens in one step of its scheduler, which it does not tell"
    )
    poll_s: float = Field(
        0.1,
        gt=0,
        le=0.5,
        description="time between two looks at its metrics while it has work, seconds",
    )
    connect_timeout_s: float = Field(5.0, gt=0, description="time to connect, seconds")
    resume: Literal["auto", "greedy", "off"] = Field(
        "auto",
        description="which replies go on at another server when this one breaks off in their "
        "middle; auto: all that can go on from their very tokens, and those that would come again "
        "the same; greedy: only those of temperature 0; off: none",
    )

    @model_validator(mode="after")
    def _check_key(self) -> Self:
        if self.key is not None and self.key_env is not None:
            raise ValueError("key and key_env: only one of them says the key")
        return self

    @field_validator("url")
    @classmethod
    def _strip_url(cls, url: str) -> str:
        return url.rstrip("/").removesuffix("/v1").rstrip("/")

    @property
    def name(self) -> str:
        """What the engine is called: its address, without the scheme."""
        return self.url.partition("://")[2]
