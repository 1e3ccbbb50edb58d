"""Which limits does a provider set?"""

from pydantic import BaseModel, ConfigDict, Field


class RateLimits(BaseModel):
    """What the provider allows under one key; unset: as it reports, or no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rpm: int | None = Field(None, ge=1, description="requests in any minute")
    tpm: int | None = Field(None, ge=1, description="tokens in any minute, prompt and output")
    max_concurrency: int | None = Field(None, ge=1, description="requests open at a time")
    max_cost_per_hour: float | None = Field(
        None, gt=0, description="cost in any hour, in the currency of the prices"
    )
    max_cost_per_day: float | None = Field(None, gt=0, description="the same in any 24 hours")
    returns_unused_tokens: bool = Field(
        False,
        description="the provider counts the output that came, not max_tokens, "
        "once a reply has ended (Anthropic; OpenAI does not)",
    )
