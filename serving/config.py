"""Which configuration keys are there, and what may they be? Validated once, at the edge.

The same keys are in `applications[0].args` of a Ray Serve config file
and in the options of `headway serve`.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from router import RequestClass, RouterSettings
from router.providers.provider import KeySettings, ProviderSettings
from router.providers.spillover import FallbackSettings
from serving.renamed import current_args


class ConfigError(ValueError):
    """A configuration that cannot work; the message names the key to change."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _absolute(path: Path) -> Path:
    path = path.expanduser()
    if not path.is_absolute():
        raise ValueError(
            "must be absolute here; `headway serve` takes it relative to the config file"
        )
    return path


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]

_EMULATED = "serving.engine.emulated.engine:EmulatedEngine"


class EngineConfig(_Section):
    """One engine replica. The value `emulated` alone means an emulated engine."""

    factory: str = Field(
        "serving.engine.vllm.engine:VllmEngine",
        description="module:class of the engine",
    )
    args: dict[str, Any] = Field(
        default_factory=dict,
        description="vLLM engine arguments by their Python names, e.g. max_model_len; "
        "they override what Headway would set",
    )
    start_timeout_s: float = Field(900.0, gt=0, description="time for engines to start, seconds")
    hang_timeout_s: float = Field(
        30.0,
        gt=0,
        description="an engine whose core has not answered between two steps for this long is "
        "restarted, seconds; must be longer than the longest step and any compilation",
    )
    step_log: AbsolutePath | None = Field(
        None,
        description="folder in which every replica writes a file with one line of JSON per step of "
        "its engine, for the study of step times; it grows without bound",
    )
    drain_timeout_s: float = Field(
        60.0, ge=0, description="time for running streams to finish on shutdown, seconds"
    )

    @model_validator(mode="before")
    @classmethod
    def _spelled_out(cls, section: Any) -> Any:
        return {"factory": _EMULATED} if section == "emulated" else section


class GatewayConfig(_Section):
    """The OpenAI-compatible HTTP server."""

    front: Literal["own", "haproxy"] = Field(
        "own",
        description="own: the gateway listens itself; haproxy: Ray Serve's HAProxy in front",
    )
    host: str = Field("127.0.0.1", description="address of the gateway's own listener")
    port: int = Field(8000, ge=1, le=65535, description="port of the gateway's own listener")
    replicas: int = Field(1, ge=1, description="gateways; on one node they share the port")
    max_body_bytes: int = Field(
        16 * 2**20, ge=1024, description="a larger request body is answered 413"
    )
    max_incoming_bytes: int = Field(
        256 * 2**20,
        ge=1024,
        description="total size of request bodies that are being received, bytes; beyond it "
        "requests are answered 429",
    )
    max_connections: int = Field(
        20_000, ge=1, description="beyond this many connections requests are answered 503"
    )
    max_head_bytes: int = Field(
        64 * 2**10, ge=1024, description="a larger request head is answered 431"
    )
    head_timeout_s: float = Field(
        30.0, gt=0, description="time for a client to send a whole request head, seconds"
    )
    body_timeout_s: float = Field(
        120.0, gt=0, description="time for a client to send a whole request body, seconds"
    )
    stall_timeout_s: float = Field(
        60.0, gt=0, description="time for a client to read from a full send buffer, seconds"
    )
    max_record_bytes: int = Field(
        256 * 2**20,
        ge=0,
        description="total size of the records of what engines have generated for open requests, "
        "bytes (12 per token); a request without a record cannot be resumed by another engine",
    )
    stream_window_bytes: int = Field(
        64 * 2**10,
        ge=4096,
        description="bytes of one response that may be on their way to a slow client",
    )


class AuthConfig(_Section):
    """Who may use the service."""

    keys_file: AbsolutePath | None = Field(
        None,
        description="file of API keys, made by `headway key create`; unset: nobody needs a key. "
        "With several nodes it must be at this path on each that runs a gateway",
    )
    open_metrics: bool = Field(False, description="whether /metrics needs no admin key")


class TenantConfig(_Section):
    """One tenant: what it may ask for, and how much. An unset limit does not limit."""

    requests_per_min: float | None = Field(None, ge=1, description="requests per minute")
    tokens_per_min: float | None = Field(
        None, gt=0, description="prompt and output tokens per minute"
    )
    max_concurrent_requests: int | None = Field(
        None, ge=1, description="requests at the same time, including held ones"
    )
    weight: float = Field(
        1.0, gt=0, description="share of tokens under overload, relative to other tenants"
    )
    models: frozenset[str] | None = Field(None, description="models allowed; unset: all")
    classes: tuple[RequestClass, ...] | None = Field(
        None, min_length=1, description="classes allowed; unset: all"
    )
    default_class: RequestClass | None = Field(
        None,
        description="class of requests that name none; unset: router.default_class if it is "
        "allowed, else the first of `classes`",
    )

    @model_validator(mode="after")
    def _check_default_class(self) -> Self:
        if self.classes and self.default_class and self.default_class not in self.classes:
            raise ValueError("default_class is not among classes")
        return self


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


class CacheConfig(_Section):
    """Responses to deterministic requests, stored to answer the same requests again."""

    enabled: bool = Field(False, description="answer repeated deterministic requests from a cache")
    ttl_s: float = Field(3600.0, gt=0, description="time that a response is stored, seconds")
    max_bytes: int = Field(
        256 * 2**20,
        ge=2**16,
        description="bound in memory, including responses that are still arriving",
    )
    max_entry_bytes: int = Field(
        4 * 2**20,
        ge=1024,
        description="a larger response is neither stored nor shared between requests",
    )
    tools: bool = Field(False, description="whether requests with tools are cached too")
    revision: str = Field(
        "", description="part of every key: with a new value no stored response is found"
    )
    redis_url: SecretStr | None = Field(
        None,
        description="store responses in this Redis, shared by gateways and bounded "
        "by its own maxmemory, e.g. redis://:password@host:6379/0; unset: in each gateway's memory",
    )


class Config(_Section):
    """All that `serving.cluster.application:build` takes."""

    model: str | None = Field(
        None, description="Hugging Face id or folder; unset on CPU: the small bundled model"
    )
    served_model_name: str | None = Field(None, description="the name clients ask for")
    device: Literal["auto", "cuda", "cpu"] = "auto"
    replicas: int | Literal["auto"] = Field("auto", description="engine replicas")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs per replica")
    engine: EngineConfig = EngineConfig()
    gateway: GatewayConfig = GatewayConfig()
    router: RouterSettings = RouterSettings()
    auth: AuthConfig = AuthConfig()
    tenants: dict[str, TenantConfig] = Field(
        default_factory=dict,
        description="limits by tenant, as named by its keys; one that is not listed has none",
    )
    providers: tuple[ProviderConfig, ...] = Field(
        (), description="services that answer what the engines cannot, in order of preference"
    )
    fallback: FallbackSettings = FallbackSettings()
    cache: CacheConfig = CacheConfig()
    watch_file: AbsolutePath | None = Field(
        None,
        description="config file whose `tenants`, `cache`, `providers` and `fallback` gateways "
        "read again when it changes; "
        "`headway serve CONFIG.yaml` sets it to that file",
    )

    @field_validator("providers")
    @classmethod
    def _check_names(cls, providers: tuple[ProviderConfig, ...]) -> tuple[ProviderConfig, ...]:
        names = [provider.name for provider in providers]
        if len(set(names)) < len(names):
            raise ValueError("each provider needs a name of its own")
        return providers


# Keys with a path that may be relative to the config file.
_PATHS = (("auth", "keys_file"), ("engine", "step_log"))


def resolved(args: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a copy of `args` with relative paths resolved against `folder`."""
    args = dict(args)
    for section, key in _PATHS:
        values = args.get(section)
        if isinstance(values, dict) and isinstance(values.get(key), str):
            path = Path(values[key]).expanduser()
            args[section] = {**values, key: str((folder / path).absolute())}
    if isinstance(args.get("providers"), list):
        args["providers"] = [_provider_resolved(each, folder) for each in args["providers"]]
    return args


def _provider_resolved(provider: Any, folder: Path) -> Any:
    """Return a provider with the paths of its keys resolved; leave malformed ones as they are."""
    keys = provider.get("keys") if isinstance(provider, dict) else None
    if not isinstance(keys, list):
        return provider
    keys = [
        {**key, "file": str((folder / Path(key["file"]).expanduser()).absolute())}
        if isinstance(key, dict) and isinstance(key.get("file"), str)
        else key
        for key in keys
    ]
    return {**provider, "keys": keys}


def read(path: Path) -> Config:
    """Return the `args` of a config file's application, validated. Raise `ConfigError` if bad."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        args = content["applications"][0].get("args") or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except (TypeError, LookupError, AttributeError):
        raise ConfigError(f"{path}: is not a Ray Serve config file") from None
    return parse(resolved(args, path.parent))


def parse(args: dict[str, Any]) -> Config:
    """Return the validated configuration; raise `ConfigError` naming each bad key.

    Old names are accepted with a warning.
    """
    try:
        args = current_args(args)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    try:
        return Config.model_validate(args)
    except ValidationError as error:
        raise ConfigError(
            "; ".join(
                f"{'.'.join(map(str, problem['loc'])) or 'config'}: {problem['msg']}"
                + (" (unknown key)" if problem["type"] == "extra_forbidden" else "")
                for problem in error.errors()
            )
        ) from None
