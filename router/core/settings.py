"""Settings of the router; the same names in YAML and in code."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from router.resilience.settings import BreakerSettings, RetryBudgetSettings
from router.scheduling.ablation import Part
from router.scheduling.policies import check_policy
from router.types import RequestClass

PolicyName = Annotated[str, AfterValidator(check_policy)]  # those of `POLICIES`


class RouterSettings(BaseModel):
    """How requests are placed and held."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: PolicyName = Field("headway", description="how an engine is chosen")
    hold: bool | None = Field(
        None, description="hold what no engine can take now; unset: as the policy prefers"
    )
    max_held_requests: int = Field(10_000, ge=0, description="bound of the hold queue, requests")
    max_held_tokens: int = Field(20_000_000, ge=0, description="bound, prompt tokens")
    max_held_bytes: int = Field(1 << 30, ge=0, description="bound, bytes of request bodies")
    max_hold_s: float = Field(300.0, gt=0, description="a request held longer expires, seconds")
    max_late_s: float | None = Field(
        30.0,
        gt=0,
        description="overload begins when a request would get its first token this much after "
        "its place in the order of service, seconds; it is refused, and so is every late one, "
        "until none has been late for as long; unset: all that would start within max_hold_s "
        "are held",
    )
    ttft_target_base_s: float = Field(
        0.5, ge=0, description="TTFT target (time to first token) of an empty prompt, seconds"
    )
    ttft_target_s_per_token: float = Field(
        0.002, ge=0, description="what each prompt token adds to the TTFT target, seconds"
    )
    ttft_target_interactive_factor: float = Field(
        0.5, gt=0, description="TTFT target of interactive requests, as a share of the standard one"
    )
    ttft_target_batch_s: float = Field(
        240.0, ge=0, description="added to the TTFT target of batch requests, seconds"
    )
    default_class: RequestClass = Field(
        RequestClass.STANDARD, description="class of requests that name none"
    )
    tpot_target_s: dict[str, float] = Field(
        default_factory=dict,
        description="TPOT target per model, seconds: an engine whose time per output token is "
        "longer gets no more requests while others are below it; '*' is every model not named",
    )
    max_prediction_error: float = Field(
        1.0,
        gt=0,
        description="above this median relative error of the predicted TTFT the queue is ordered "
        "by arrival, until the error is half of it",
    )
    stale_s: float = Field(
        3.0, gt=0, description="an engine that is silent for longer gets no work, seconds"
    )
    hang_s: float = Field(
        4.0,
        gt=0,
        description="an engine is hung when a scheduler step takes longer than this, seconds, and "
        "longer than four times its prediction",
    )
    max_attempts: int = Field(
        4,
        ge=1,
        description="a request is given up when so many engines in a row have failed under it "
        "without its reply getting further, or three times as many in all",
    )
    suspect_hold_s: float = Field(
        300.0,
        ge=0,
        description="an engine died or hung under a request before it had an answer: for so long "
        "the request may wait for an engine to itself, seconds; the last engine is not risked",
    )
    refuse_s: float = Field(
        600.0,
        ge=0,
        description="a request under which a second engine died or hung is refused, and so is "
        "every one of the same body, for so long, seconds",
    )
    hedge_factor: float | None = Field(
        None,
        gt=1,
        description="a request without a first token after so many times its prediction is also "
        "sent to a second engine, out of the retry budget; unset: never",
    )
    breaker: BreakerSettings = BreakerSettings()
    retry: RetryBudgetSettings = RetryBudgetSettings()
    seed: int = Field(0, description="seed of all random choices")
    ablate: tuple[Part, ...] = Field(
        (), description="parts of headway that are switched off, to see what they are worth"
    )
