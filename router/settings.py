"""Settings of the router; the same names in YAML and in code."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from router.resilience.breaker import BreakerSettings
from router.resilience.retry_budget import RetryBudgetSettings
from router.types import RequestClass

PolicyName = Literal[
    "headway",
    "round_robin",
    "least_requests",
    "least_response_time",
    "power_of_two",
    "least_kv_usage",
    "cache_aware",
    "weighted_score",
]
Part = Literal["hold", "order", "prefix", "congestion_cost", "length"]


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
    max_late_s: float | None = Field(
        30.0,
        gt=0,
        description="a request that would get its first token so much after its turn means "
        "overload: it is refused, and so is every other that would be late, until none has been "
        "for as long, seconds; unset: all that would be in time for max_hold_s are held",
    )
    ttft_target_base_s: float = Field(
        0.5, ge=0, description="promised time to first token of an empty prompt, seconds"
    )
    ttft_target_s_per_token: float = Field(
        0.002, ge=0, description="what each prompt token adds to the promise, seconds"
    )
    ttft_target_interactive_factor: float = Field(
        0.5, gt=0, description="the promise to interactive requests, of the standard one"
    )
    ttft_target_batch_s: float = Field(
        240.0, ge=0, description="how much later batch work is promised, seconds"
    )
    default_class: RequestClass = Field(
        RequestClass.STANDARD, description="class of requests that name none"
    )
    tpot_target_s: dict[str, float] = Field(
        default_factory=dict,
        description="per model: time per output token past which an engine gets no more requests "
        "while others are below it, seconds; '*' stands for every model not named",
    )
    max_prediction_error: float = Field(
        1.0,
        gt=0,
        description="median relative error of predicted first tokens past which the queue is "
        "ordered by arrival until predictions are twice as good",
    )
    stale_s: float = Field(
        3.0, gt=0, description="an engine that is silent for longer is given no work, seconds"
    )
    hang_s: float = Field(
        4.0,
        gt=0,
        description="so long may a scheduler step take, seconds, or four times its prediction "
        "where that is longer; past it the engine is hung",
    )
    max_attempts: int = Field(
        4,
        ge=1,
        description="engines that may fail in a row under one request whose reply gets no "
        "further, before it is given up; three times as many in all",
    )
    hedge_factor: float | None = Field(
        None,
        gt=1,
        description="a request whose first token has not come after so many times its "
        "prediction is sent to a second engine, too, out of the retry budget; unset: never",
    )
    breaker: BreakerSettings = BreakerSettings()
    retry: RetryBudgetSettings = RetryBudgetSettings()
    seed: int = Field(0, description="seed of all that is drawn")
    ablate: tuple[Part, ...] = Field(
        (), description="parts of headway to do without, to see what they are worth"
    )
