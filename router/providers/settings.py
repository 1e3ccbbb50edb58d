"""Which providers are there, and when do requests go to them?"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from router.limits.settings import RateLimits
from router.resilience.settings import BreakerSettings

SpillWhen = Literal["late", "full", "unavailable"]


class FallbackSettings(BaseModel):
    """When requests go to providers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    spill: SpillWhen = Field(
        "late",
        description="unavailable: only when no engine takes work; full: also when the hold "
        "queue is full; late: also when the predicted first token comes after its target "
        "and the provider's is sooner",
    )
    late_factor: float = Field(
        1.0,
        gt=0,
        description="late is a first token predicted after so many times its target; below "
        "1 keeps a margin for what predictions are off by",
    )


class KeySettings(RateLimits):
    """One API key of a provider, and what may be sent under it."""

    name: str = Field("default", description="what the key is called in states and metrics")


class ProviderSettings(BaseModel):
    """What the router has to know of a provider."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[\w.-]+$", description="what it is called in states and metrics")
    models: dict[str, str] = Field(
        min_length=1, description="models it answers for: our name, and its own"
    )
    keys: tuple[KeySettings, ...] = Field(
        (KeySettings(),), min_length=1, description="API keys, each with limits of its own"
    )
    price_prompt: float = Field(0.0, ge=0, description="price of a million prompt tokens")
    price_output: float = Field(0.0, ge=0, description="price of a million output tokens")
    max_cost_per_request: float | None = Field(
        None, gt=0, description="requests predicted to cost more stay here"
    )
    ttft_s: float = Field(
        0.5, gt=0, description="expected time to first token, until it is learned, seconds"
    )
    continues: bool = Field(
        False,
        description="goes on with a chat's reply that another provider has begun "
        "(continue_final_message: vLLM, Headway; the same model, or the text will show it)",
    )
    breaker: BreakerSettings = BreakerSettings(max_consecutive_failures=2)
