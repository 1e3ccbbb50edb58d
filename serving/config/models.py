"""What may each of several models have of its own? The rest is as the keys outside `models` say."""

from typing import Annotated, Any, Literal

from pydantic import Field

from router.scaling.settings import ScalingSettings
from serving.config.engine import EngineConfig
from serving.config.section import Section

Seconds = Annotated[float, Field(ge=0)]


class ModelConfig(Section):
    """One of `models`; what it leaves out is as the key of that name outside says."""

    model: str | None = Field(
        None, description="Hugging Face id or folder; unset on CPU: the small bundled model"
    )
    served_model_name: str | tuple[str, ...] | None = Field(
        None, description="the name clients ask for, or a list; unset: `model`"
    )
    aliases: tuple[str, ...] = Field((), description="further names of the same model")
    replicas: int | Literal["auto"] | ScalingSettings | None = Field(
        None, description="engines of this model; auto: a share of what other models leave"
    )
    idle_sleep_s: Annotated[float, Field(gt=0)] | None = Field(
        None, description="as the `idle_sleep_s` outside, for this model"
    )
    tensor_parallel_size: int | None = Field(None, ge=1, description="GPUs per engine")
    engine: EngineConfig | None = Field(
        None,
        description="keys of `engine` that are this model's own; its `args` are added to those of "
        "the section outside, unless its `factory` is another",
    )
    ttft_target_base_s: Seconds | None = Field(
        None, description="as `router.ttft_target_base_s`, for this model"
    )
    ttft_target_s_per_token: Seconds | None = Field(
        None, description="as `router.ttft_target_s_per_token`, for this model"
    )
    tpot_target_s: Annotated[float, Field(gt=0)] | None = Field(
        None, description="as `router.tpot_target_s`, for this model"
    )

    @property
    def served_names(self) -> tuple[str, ...]:
        """The names clients ask for, as far as they are configured."""
        first = self.served_model_name or (self.aliases and self.model) or ()
        return ((first,) if isinstance(first, str) else first) + self.aliases

    def engine_beside(self, outer: EngineConfig) -> EngineConfig:
        """Return the section `engine` for this model, by its own keys and those outside."""
        if self.engine is None:
            return outer
        own: dict[str, Any] = self.engine.model_dump(exclude_unset=True)
        merged = outer.model_dump() | own
        if merged["factory"] == outer.factory:
            merged["args"] = outer.args | self.engine.args
        elif "args" not in own:
            merged["args"] = {}  # what the other engine takes, this one need not
        return EngineConfig.model_validate(merged)
