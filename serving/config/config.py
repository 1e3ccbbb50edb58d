"""What does the whole configuration consist of, and how is it read?"""

import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from router import RouterSettings
from router.core.choice.settings import RouteSettings
from router.providers.settings import FallbackSettings
from router.scaling.settings import ScalingSettings
from serving.config.access import AuthConfig, TenantConfig
from serving.config.batch import BatchConfig
from serving.config.cache import CacheConfig
from serving.config.engine import EngineConfig
from serving.config.gateway import GatewayConfig
from serving.config.models import ModelConfig
from serving.config.providers import ExternalConfig, ProviderConfig
from serving.config.renamed import current_args
from serving.config.section import AbsolutePath, ConfigError, Section
from serving.config.seen import LogConfig, TracingConfig


class Config(Section):
    """All that `serving.cluster.application:build` takes."""

    model: str | None = Field(
        None, description="Hugging Face id or folder; unset on CPU: the small bundled model"
    )
    served_model_name: str | tuple[str, ...] | None = Field(
        None, description="the name clients ask for, or a list: further names mean the same model"
    )
    device: Literal["auto", "cuda", "cpu"] = "auto"
    replicas: int | Literal["auto"] | ScalingSettings = Field(
        "auto",
        description="engine replicas: a number, auto, or {min, max, ...}: as many as are needed",
    )
    idle_sleep_s: float | None = Field(
        None,
        gt=0,
        description="after so long without a request, seconds, the engines stop, and the next one "
        "starts them: as replicas `{min: 0, zero_after_s: …}` up to the number that they have else",
    )
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs per replica")
    placement: Literal["spread", "pack"] = Field(
        "spread",
        description="over several nodes: spread puts each next engine where fewest are, so that a "
        "lost node takes few; pack fills one node after the other and leaves the rest free",
    )
    models: tuple[ModelConfig, ...] = Field(
        (),
        description="several models in one service, each with engines of its own; the keys "
        "outside say what one leaves out. In place of `model` and `served_model_name`",
    )
    routes: dict[str, RouteSettings] = Field(
        default_factory=dict,
        description="names that clients ask for as if they were models, such as `auto`: the model "
        "is chosen for each prompt",
    )
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
    external: tuple[ExternalConfig, ...] = Field(
        (),
        description="servers that run already, `vllm serve` or any OpenAI-compatible one: engines "
        "beside our own, or alone with `headway attach`",
    )
    cache: CacheConfig = CacheConfig()
    batch: BatchConfig = BatchConfig()
    log: LogConfig = LogConfig()
    tracing: TracingConfig = TracingConfig()
    watch_file: AbsolutePath | None = Field(
        None,
        description="config file whose `tenants`, `cache`, `providers`, `external`, `fallback` "
        "and `routes` gateways read again when it changes; "
        "`headway serve CONFIG.yaml` sets it to that file, and starts and stops `models` by it",
    )

    @property
    def scaling(self) -> ScalingSettings | None:
        """How many engines of the only model there may be; None where their number is fixed."""
        return self.replicas if isinstance(self.replicas, ScalingSettings) else None

    def scaled_up_to(self, num_engines: int) -> "Config":
        """Return this, of one model, with what `idle_sleep_s` means in `replicas`.

        `num_engines`: of them that were planned.
        """
        if self.idle_sleep_s is None:
            return self
        # They start with the service, and not with the first request.
        asleep = {"min": 0, "zero_after_s": self.idle_sleep_s}
        settings = self.scaling or ScalingSettings(max=num_engines, initial=num_engines)
        if settings.initial is None:
            asleep["initial"] = 1
        return self.model_copy(update={"replicas": settings.model_copy(update=asleep)})

    @property
    def max_replicas(self) -> int | Literal["auto"]:
        """Engines at most, all of which have to fit."""
        return self.replicas.max if isinstance(self.replicas, ScalingSettings) else self.replicas

    @property
    def served_names(self) -> tuple[str, ...]:
        """The names clients ask for, as far as they are configured."""
        names = self.served_model_name or ()
        return (names,) if isinstance(names, str) else names

    def by_model(self) -> tuple["Config", ...]:
        """Return a configuration per model, as if there were no other; without `models`, this."""
        return tuple(map(self._of_model, self.models)) or (self,)

    def _of_model(self, model: ModelConfig) -> "Config":
        of_router = ("ttft_target_base_s", "ttft_target_s_per_token")
        targets: dict[str, Any] = {
            key: value for key in of_router if (value := getattr(model, key)) is not None
        }
        if model.tpot_target_s is not None:
            targets["tpot_target_s"] = {"*": model.tpot_target_s}
        return self.model_copy(
            update={
                "models": (),
                "model": model.model,
                "served_model_name": model.served_names or None,
                "replicas": self.replicas if model.replicas is None else model.replicas,
                "idle_sleep_s": model.idle_sleep_s or self.idle_sleep_s,
                "tensor_parallel_size": model.tensor_parallel_size or self.tensor_parallel_size,
                "engine": model.engine_beside(self.engine),
                "router": self.router.model_copy(update=targets),
            }
        )

    @model_validator(mode="after")
    def _check_models(self) -> "Config":
        if not self.models:
            return self
        for key in ("model", "served_model_name"):
            if getattr(self, key) is not None:
                raise ValueError(
                    f"{key}: is the short form for one model, and `models` lists several: "
                    f"remove {key}, or put it into an entry of the list"
                )
        seen: dict[str, int] = {}
        for index, model in enumerate(self.models):
            if model.aliases and not (model.served_model_name or model.model):
                raise ValueError(f"models.{index}.aliases: set served_model_name beside them")
            for name in model.served_names or (model.model or "",):
                if name in seen:
                    raise ValueError(
                        f"models.{index}: the name {name or 'of the bundled model'!r} is that of "
                        f"models.{seen[name]} already: set another served_model_name or alias"
                    )
                seen[name] = index
        return self

    @model_validator(mode="after")
    def _check_sleep(self) -> "Config":
        for index, config in enumerate(self.by_model()):
            key = f"models.{index}." if self.models else ""
            scaling = config.scaling
            if config.idle_sleep_s is None or scaling is None:
                continue
            if scaling.min > 0 and "min" in scaling.model_fields_set:
                raise ValueError(
                    f"{key}idle_sleep_s: lets no engine run, and replicas.min is {scaling.min}: "
                    "remove one of them"
                )
            if "zero_after_s" in scaling.model_fields_set:
                raise ValueError(
                    f"{key}idle_sleep_s: is another name for replicas.zero_after_s, which is set, "
                    "too: remove one of them"
                )
        return self

    @field_validator("served_model_name")
    @classmethod
    def _check_served_names(cls, names: str | tuple[str, ...] | None) -> Any:
        listed = (names,) if isinstance(names, str) else names
        if listed is not None and (not listed or "" in listed or len(set(listed)) < len(listed)):
            raise ValueError("has to be a name, or a list of at least one name, each once")
        return names

    @field_validator("external")
    @classmethod
    def _check_urls(cls, servers: tuple[ExternalConfig, ...]) -> tuple[ExternalConfig, ...]:
        names = [server.name for server in servers]
        if len(set(names)) < len(names):
            raise ValueError("each server's url may be there once")
        return servers

    @model_validator(mode="after")
    def _check_routes(self) -> "Config":
        names = {name for each in self.models for name in each.served_names or (each.model or "",)}
        for name in self.routes:
            if not name:
                raise ValueError("routes: a route needs a name")
            if name in names or name in self.served_names:
                raise ValueError(f"routes.{name}: is the name of a model: give the route another")
        return self

    @field_validator("providers")
    @classmethod
    def _check_names(cls, providers: tuple[ProviderConfig, ...]) -> tuple[ProviderConfig, ...]:
        names = [provider.name for provider in providers]
        if len(set(names)) < len(names):
            raise ValueError("each provider needs a name of its own")
        return providers


# Keys with a path that may be relative to the config file.
_PATHS = (
    ("auth", "keys_file"),
    ("batch", "dir"),
    ("engine", "step_log"),
    ("gateway", "tls_cert_file"),
    ("gateway", "tls_key_file"),
    ("log", "dir"),
)


def resolved(args: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a copy of `args` with relative paths resolved against `folder`."""
    args = dict(args)
    for section, key in _PATHS:
        values = args.get(section)
        if isinstance(values, dict) and isinstance(values.get(key), str):
            args[section] = {**values, key: _absolute(values[key], folder)}
    if isinstance(args.get("models"), list):
        args["models"] = [_model_resolved(each, folder) for each in args["models"]]
    if isinstance(args.get("providers"), list):
        args["providers"] = [_provider_resolved(each, folder) for each in args["providers"]]
    return args


def _model_resolved(model: Any, folder: Path) -> Any:
    """Return a model with the path of its steps' log resolved."""
    engine = model.get("engine") if isinstance(model, dict) else None
    if not isinstance(engine, dict) or not isinstance(engine.get("step_log"), str):
        return model
    return {**model, "engine": {**engine, "step_log": _absolute(engine["step_log"], folder)}}


def _provider_resolved(provider: Any, folder: Path) -> Any:
    """Return a provider with the paths of its keys resolved; leave malformed ones as they are."""
    keys = provider.get("keys") if isinstance(provider, dict) else None
    if not isinstance(keys, list):
        return provider
    keys = [
        {**key, "file": _absolute(key["file"], folder)}
        if isinstance(key, dict) and isinstance(key.get("file"), str)
        else key
        for key in keys
    ]
    return {**provider, "keys": keys}


def _absolute(path: str, folder: Path) -> str:
    # Not Path.expanduser: it raises an error for a user that does not exist.
    return str((folder / os.path.expanduser(path)).absolute())


def read(path: Path) -> Config:
    """Return the `args` of a config file's application, validated. Raise `ConfigError` if bad."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        args = dict(content["applications"][0].get("args") or {})
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except (TypeError, ValueError, LookupError, AttributeError):
        raise ConfigError(
            f"{path}: is not a Ray Serve config file with keys under applications.0.args"
        ) from None
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
                f"{_with_key(problem['loc'], problem['msg'])}"
                + (" (unknown key)" if problem["type"] == "extra_forbidden" else "")
                for problem in _errors_in_given_form(error)
            )
        ) from None


def _errors_in_given_form(error: ValidationError) -> list[ErrorDetails]:
    """Return what is wrong; where keys are given not that they are no number, and no word."""
    problems = error.errors()
    with_keys = {
        each["loc"][:place]
        for each in problems
        for place, part in enumerate(each["loc"])
        if str(part).startswith("function-")
    }
    return [
        each
        for each in problems
        if not isinstance(each["input"], dict)
        or each["type"] not in ("int_type", "literal_error")
        or each["loc"][:-1] not in with_keys
    ]


def _with_key(path: tuple[int | str, ...], message: str) -> str:
    """Return the message behind the key that it is about; it names that itself where none is."""
    message = message.removeprefix("Value error, ")
    # Pydantic has the forms that a value may have, as literal['auto'], in the path to it.
    keys = [str(each) for each in path if each != "int" and "[" not in str(each)]
    return f"{'.'.join(keys)}: {message}" if keys else message
