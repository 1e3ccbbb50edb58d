"""Settings of the router; the same names in YAML and in code."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

PolicyName = Literal[
    "headway", "round_robin", "least_requests", "least_response_time", "power_of_two"
]


class RouterSettings(BaseModel):
    """How requests are placed and held."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: PolicyName = Field("headway", description="how an engine is chosen")
    hold: bool | None = Field(
        None, description="hold what fits no engine now; unset: as the policy prefers"
    )
    max_held_requests: int = Field(10_000, ge=0, description="bound of the hold queue, requests")
    max_held_tokens: int = Field(20_000_000, ge=0, description="bound, prompt tokens")
    max_held_bytes: int = Field(1 << 30, ge=0, description="bound, bytes of request bodies")
    max_hold_s: float = Field(300.0, gt=0, description="a request held longer expires, seconds")
    promise_base_s: float = Field(
        0.5, ge=0, description="promised time to first token of an empty prompt, seconds"
    )
    promise_s_per_token: float = Field(
        0.002, ge=0, description="what each prompt token adds to the promise, seconds"
    )
    seed: int = Field(0, description="seed of the policies that draw")
