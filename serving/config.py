"""Headway's configuration: parsed and validated once, at the edge.

The same keys stand under `applications[0].args` of a Ray Serve config file
and in the options of `headway serve`.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from router.settings import RouterSettings


class ConfigError(ValueError):
    """A configuration that cannot work; the message names the key to change."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineConfig(_Section):
    """One engine replica."""

    factory: str = Field(
        "serving.engine:VllmEngine", description="module:class of the engine behind the stream"
    )
    args: dict[str, Any] = Field(
        default_factory=dict,
        description="vLLM engine arguments by their Python names, e.g. max_model_len; "
        "they win over what Headway would set",
    )
    start_timeout_s: float = Field(900.0, gt=0, description="give up on an engine after, seconds")
    drain_timeout_s: float = Field(
        60.0, ge=0, description="running streams may finish for so long on shutdown, seconds"
    )


class GatewayConfig(_Section):
    """The OpenAI-compatible front."""

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
    stream_window_bytes: int = Field(
        64 * 2**10, ge=4096, description="bytes of one response in flight to a slow reader"
    )


class Config(_Section):
    """All that `serving.app:build` takes."""

    model: str | None = Field(
        None, description="Hugging Face id or folder; unset on CPU: the small model on board"
    )
    served_model_name: str | None = Field(None, description="the name clients ask for")
    device: Literal["auto", "cuda", "cpu"] = "auto"
    replicas: int | Literal["auto"] = Field("auto", description="engine replicas")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs per replica")
    engine: EngineConfig = EngineConfig()
    gateway: GatewayConfig = GatewayConfig()
    router: RouterSettings = RouterSettings()


def parse(args: dict[str, Any]) -> Config:
    """Return the validated configuration; raise `ConfigError` naming each bad key."""
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
